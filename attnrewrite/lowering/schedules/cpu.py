"""CPU schedules: every function TVM's operators left as plain loops gets register tiles, lanes and threads."""

from __future__ import annotations

from tvm import IRModule, s_tir, tirx
from tvm.target import Target

from attnrewrite.lowering.choices import Choices
from attnrewrite.lowering.kernels.vector_math import VectorUnit, vector_unit
from attnrewrite.lowering.schedules.contraction import can_follow, lower_contraction
from attnrewrite.lowering.schedules.loops import Stmt, seq
from attnrewrite.lowering.schedules.products import match_contraction
from attnrewrite.lowering.schedules.rows import lower_rows, lower_stage
from attnrewrite.lowering.schedules.stages import Stage, inline, parse, reads


def schedule(mod: IRModule, target: Target, tuned: Choices | None = None) -> IRModule:
    """The module with every PrimFunc that is not scheduled yet scheduled for an `llvm` target."""
    unit = vector_unit(target)
    for name, func in mod.functions.items():
        if isinstance(func, tirx.PrimFunc) and isinstance(func.body, s_tir.SBlockRealize):
            mod[name] = schedule_function(func, unit, tuned)
    return mod


def schedule_function(func: tirx.PrimFunc, unit: VectorUnit, tuned: Choices | None = None) -> tirx.PrimFunc:
    """One function with loops written anew; what cannot be read as stages (scans, sorting) comes back as it is."""
    read = stages_of(func)
    if read is None:
        return func
    stages, operands = read
    body = lower(stages, operands, unit, tuned)
    attributes = {key: value for key, value in func.attrs.items() if key != "s_tir"}
    return tirx.PrimFunc(func.params, body, func.ret_type).with_attrs(attributes)


def stages_of(func: tirx.PrimFunc) -> tuple[list[Stage], list[tirx.Buffer]] | None:
    """(the stages that loops are written for, the function's operands); None where it cannot be read as stages."""
    parsed = parse(func)
    if parsed is None:
        return None
    operands = [param for param in func.params if isinstance(param, tirx.Buffer) or tirx.is_buffer_var(param)]
    return inline(parsed, operands), operands


def lower(stages: list[Stage], operands: list[tirx.Buffer], unit: VectorUnit, tuned: Choices | None = None) -> Stmt:
    """Loops of all stages of one function, in order."""
    contractions = {stage.buffer: match_contraction(stage) for stage in stages}
    if not any(contractions.values()) and (rows := lower_rows(stages, operands, unit.lanes)) is not None:
        return rows
    statements: list[Stmt] = []
    stored: list[tirx.Buffer] = []
    position = 0
    while position < len(stages):
        stage = stages[position]
        contraction = contractions[stage.buffer]
        if contraction is None:
            statements.append(lower_stage(stage, unit.lanes))
        else:
            later = stages[position + 1 :]
            readers = [s for s in later if reads(s.value, stage.buffer)]
            fused = later and readers == later[:1] and can_follow(later[0], stage) and stage.buffer not in operands
            epilogue = later[0] if fused else None
            statements.append(lower_contraction(contraction, epilogue, unit, tuned))
            if epilogue is not None:
                position += 1
                stage = epilogue
        stored.append(stage.buffer)
        position += 1
    temporary = [buffer for buffer in stored if not any(buffer.same_as(operand) for operand in operands)]
    return seq(*(tirx.AllocBuffer(buffer) for buffer in temporary), *statements)
