"""GPU schedules, for CUDA and Metal: every function TVM's operators left as plain loops becomes kernel launches."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import IRModule, s_tir, tirx
from tvm.s_tir import dlight
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.schedules.contraction import can_follow
from attnrewrite.lowering.schedules.gpu_contraction import emit_contraction, worth_tiling
from attnrewrite.lowering.schedules.gpu_emit import Device, rebuild
from attnrewrite.lowering.schedules.gpu_parts import operands as read_by
from attnrewrite.lowering.schedules.gpu_rows import emit_rows, emit_stage, rows_fit
from attnrewrite.lowering.schedules.products import DTYPES, Contraction, match_contraction
from attnrewrite.lowering.schedules.stages import Stage, inline, parse, reads

MADE_BY = "attnrewrite.schedule"
"""Attribute of a scheduled function: what wrote its kernels. Absent from the kernels of the two ops."""

PRODUCT, ROWS, STAGES, GENERIC = "product", "rows", "stages", "generic"


def schedule(mod: IRModule, target: Target) -> IRModule:
    """The module with every PrimFunc that is not scheduled yet scheduled for a `cuda` or `metal` target."""
    for name, func in mod.functions.items():
        if isinstance(func, tirx.PrimFunc) and isinstance(func.body, s_tir.SBlockRealize):
            scheduled = schedule_function(func, target)
            # Both the IR builder and TVM's generic schedule name every function `main`.
            named = "global_symbol" in func.attrs
            mod[name] = scheduled if named else scheduled.without_attr("global_symbol")
    return mod


def schedule_function(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """One function as a sequence of kernels, its intermediate tensors in device memory.

    Products and convolutions are tiled (PRODUCT), what runs row by row is one kernel (ROWS), every other stage is one
    of its own (STAGES); the attribute MADE_BY says which, the first that applies. What cannot be read as stages
    (sorting, scatter) gets TVM's own generic schedule (GENERIC): right, not fast.
    """
    if func.attrs.get("tirx.is_scheduled", False):
        return func
    parsed = parse(func)
    if parsed is None:
        with target:
            fallback = dlight.gpu.Fallback().apply(func, target, False)
        scheduled = func if fallback is None else fallback.mod["main"]
        return scheduled.with_attrs({**func.attrs, "tirx.is_scheduled": True, MADE_BY: GENERIC})
    operands = [param for param in func.params if isinstance(param, tirx.Buffer) or tirx.is_buffer_var(param)]
    device = Device.of(target)
    stages = inline(parsed, operands)
    if any(len(read_by(stage.value)) >= device.buffers for stage in stages):
        stages = parsed  # one kernel for each, of fewer tensors
    made_by: list[str] = []
    scheduled = rebuild(func, lambda: made_by.append(_emit(stages, operands, device)))
    return scheduled.with_attr(MADE_BY, made_by[0])


def _emit(stages: list[Stage], operands: list[tirx.Buffer], device: Device) -> str:
    """Kernels for all stages of one function, in order; returns what they are."""
    matched = {stage.buffer: match_contraction(stage, (*DTYPES, "bfloat16")) for stage in stages}
    contractions = {buffer: c for buffer, c in matched.items() if c is not None and worth_tiling(c)}
    if not contractions and (shared := rows_fit(stages, operands, device)):
        emit_rows(stages, operands, shared, device)
        return ROWS
    epilogues = _fusible_epilogues(stages, operands, contractions, device)
    fused = [epilogue.buffer for epilogue in epilogues.values()]
    for stage in stages:
        if stage.buffer not in epilogues and not _is_one_of(stage.buffer, operands):
            T.add_to_parent(tirx.AllocBuffer(stage.buffer))
    for stage in stages:
        if stage.buffer in contractions:
            emit_contraction(contractions[stage.buffer], epilogues.get(stage.buffer), device)
        elif stage.buffer not in fused:
            emit_stage(stage, device)
    return PRODUCT if contractions else STAGES


def _fusible_epilogues(
    stages: list[Stage], operands: list[tirx.Buffer], contractions: Mapping[tirx.Buffer, Contraction], device: Device
) -> dict[tirx.Buffer, Stage]:
    """For each contraction whose result only the next stage reads, element by element: that stage."""
    found: dict[tirx.Buffer, Stage] = {}
    for position, stage in enumerate(stages[:-1]):
        following, readers = stages[position + 1], [s for s in stages if reads(s.value, stage.buffer)]
        needed_elsewhere = stage.buffer not in contractions or _is_one_of(stage.buffer, operands)
        too_many = len(read_by(stage.value) | read_by(following.value)) >= device.buffers
        if not needed_elsewhere and not too_many and readers == [following] and can_follow(following, stage):
            found[stage.buffer] = following
    return found


def _is_one_of(buffer: tirx.Buffer, operands: list[tirx.Buffer]) -> bool:
    return any(buffer.same_as(operand) for operand in operands)
