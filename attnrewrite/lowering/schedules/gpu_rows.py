"""Element-wise, movement and reduction stages on a GPU.

Neighbouring threads take neighbouring elements of the output, in runs of four where these are neighbours in all that
is read (gpu_runs.py). A reduction that reads memory along its own axis has neighbouring threads share each output
instead, and combine their parts in shared memory. Stages that share their leading axes (softmax, the normalisations)
run row by row in one kernel, with what they hand on in shared memory; what all rows read alike stays in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import tvm_ffi
from tvm import DataType, ir, tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import barrier, load, registers, store, when
from attnrewrite.lowering.schedules.gpu_emit import (
    Bound,
    Device,
    Thread,
    accumulator_type,
    as_type,
    below,
    bind_axes,
    ceil_div,
    count,
    keep,
    launch,
    put,
)
from attnrewrite.lowering.schedules.gpu_parts import parts_of_choice
from attnrewrite.lowering.schedules.gpu_reads import Read
from attnrewrite.lowering.schedules.gpu_runs import RunStage, may_run
from attnrewrite.lowering.schedules.gpu_vectors import LANES
from attnrewrite.lowering.schedules.loops import const
from attnrewrite.lowering.schedules.rows import agreed_axes, combine, lanes_along_output
from attnrewrite.lowering.schedules.stages import Axis, Expr, Stage, loads_of, reads, substitute

THREADS = 256
SIMD = 32

# From this many reduction steps on, several threads share one output.
MANY_STEPS = 64

# Outputs that keep a GPU busy with one thread each.
MANY_OUTPUTS = 1 << 15


def emit_stage(stage: Stage, device: Device) -> None:
    """One kernel launch for one stage; several where a choice among tensors has more of them than a kernel may take."""
    if stage.reduction:
        _emit_reduction(stage, device)
        return
    outputs = count(stage.axes)
    for part, condition in parts_of_choice(stage, device.buffers):
        if condition is None and may_run(part, part.axes):
            with launch(ceil_div(outputs, LANES * THREADS), (THREADS, 1)) as thread:
                run = RunStage(part, part.axes, device)
                first = keep((thread.block * const(THREADS) + thread.x) * LANES)
                with when(below(first, outputs, LANES * THREADS)):
                    run.emit(first, {}, run.reads)
            continue
        with launch(ceil_div(outputs, THREADS), (THREADS, 1)) as thread:
            flat = keep(thread.block * const(THREADS) + thread.x)
            with when(below(flat, outputs, THREADS)):
                at = bind_axes(stage.axes, flat)
                with when(True if condition is None else substitute(condition, at)):
                    put(device, stage.buffer, [at[axis.var] for axis in stage.axes], substitute(part.value, at))


def _emit_reduction(stage: Stage, device: Device) -> None:
    """Threads of a group: `outputs x parts`, where the parts of one output are combined in shared memory at the end."""
    steps, outputs = count(stage.reduction), count(stage.axes)
    along_output = lanes_along_output(stage)
    many_outputs = not isinstance(outputs, int) or outputs >= MANY_OUTPUTS
    if (isinstance(steps, int) and steps < MANY_STEPS) or (along_output and many_outputs):
        parts = 1
    else:
        parts = 8 if along_output else SIMD
    outputs_per_group = THREADS // parts
    size = (outputs_per_group, parts) if along_output else (parts, outputs_per_group)
    with launch(ceil_div(outputs, outputs_per_group), size) as thread:
        mine, part = (thread.x, thread.y) if along_output else (thread.y, thread.x)
        flat = keep(thread.block * const(outputs_per_group) + mine)
        inside = below(flat, outputs, outputs_per_group)
        # Threads past the last output repeat it, so that all arrive at the barriers.
        at = bind_axes(stage.axes, flat if inside is True else tirx.min(flat, const(1) * outputs - 1))
        total = registers(1, accumulator_type(stage.buffer))
        _reduce_part(stage, at, part, parts, total, device)
        if parts > 1:
            strides = (parts, 1) if not along_output else (1, outputs_per_group)
            _combine_parts(stage, mine * strides[0] + part * strides[1], part, parts, strides[1], total)
        writes = inside if parts == 1 else part == 0 if inside is True else tirx.all(part == 0, inside)
        with when(writes):
            put(device, stage.buffer, [at[axis.var] for axis in stage.axes], load(total, [0]))


def _reduce_part(stage: Stage, at: Bound, part: Expr, parts: int, total: tirx.Buffer, device: Device) -> None:
    """total[0] = the combination over steps part, part + parts, part + 2 * parts ..."""
    put(device, total, [0], stage.init)
    steps = count(stage.reduction)
    with T.serial(ceil_div(steps, parts)) as round_:
        step = keep(round_ * const(parts) + part)
        with when(below(step, steps, parts)):
            where = {**at, **bind_axes(stage.reduction, step)}
            term = as_type(substitute(stage.value, where), str(total.dtype))
            put(device, total, [0], combine(stage.combine, load(total, [0]), term))


def _combine_parts(stage: Stage, slot: Expr, part: Expr, parts: int, stride: int, total: tirx.Buffer) -> None:
    """total[0] of every thread = the combination of all parts of its output, by halving; begins and ends in step.

    slot: this thread's place in the exchange memory; parts of one output lie `stride` apart.
    """
    exchange = T.alloc_buffer((THREADS,), total.dtype, scope="shared")
    barrier()  # whoever used this memory before is done
    store(exchange, [slot], load(total, [0]))
    half = parts // 2
    while half:
        barrier()
        with when(part < half):
            store(
                exchange, [slot], combine(stage.combine, load(exchange, [slot]), load(exchange, [slot + half * stride]))
            )
        half //= 2
    barrier()
    store(total, [0], load(exchange, [slot - part * stride]))


def rows_fit(stages: Sequence[Stage], kept: Sequence[tirx.Buffer], device: Device) -> int:
    """How many leading axes the stages share; 0 where they share none, or where a row does not fit into shared memory,
    one kernel cannot take all their tensors, or what it stores in device memory is read again: barriers are of shared
    memory alone.
    """
    shared = _shared_axes(stages)
    if len(stages) < 2 or shared == 0 or len(kept) > device.buffers:
        return 0
    row_bytes = 0
    for stage in stages:
        size = count(stage.axes[shared:])
        if not isinstance(size, int) or not isinstance(count(stage.reduction), int):
            return 0
        if any(stage.buffer.same_as(k) for k in kept):
            if any(reads(other.value, stage.buffer) for other in stages):
                return 0
        else:
            row_bytes += size * DataType(str(stage.buffer.dtype)).itemsize
    return shared if row_bytes <= device.limits.shared_bytes // 2 else 0


def _shared_axes(stages: Sequence[Stage]) -> int:
    """The leading axes of rows: all but the last of the largest tensors, all of those with one number for each row."""
    rank = max(len(stage.axes) for stage in stages)

    def rows_of(stage: Stage) -> int:
        own = len(stage.axes)
        return own - (lanes_along_output(stage) if stage.reduction else own == rank)

    return agreed_axes(stages, max(0, min(map(rows_of, stages))))


def emit_rows(stages: Sequence[Stage], kept: Sequence[tirx.Buffer], shared: int, device: Device) -> None:
    """One kernel launch for stages that share their first `shared` axes: threads (x, y) = (within a row, rows)."""
    stages = _read_once(stages, kept, shared, device.limits.shared_bytes // 2)
    longest = max(count((*stage.axes[shared:], *stage.reduction)) for stage in stages)
    lanes = SIMD
    while lanes < THREADS and longest > LANES * lanes:
        lanes *= 2
    passed_on = [stage.buffer for stage in stages if not any(stage.buffer.same_as(k) for k in kept)]
    sizes = {stage.buffer: count(stage.axes[shared:]) for stage in stages}
    row_bytes = sum(sizes[b] * DataType(str(b.dtype)).itemsize for b in passed_on)
    rows = max(1, min(THREADS // lanes, device.limits.shared_bytes // 2 // max(row_bytes, 1)))
    all_rows = count(stages[0].axes[:shared])
    turns = _turns(ceil_div(all_rows, rows), device)
    with launch(ceil_div(all_rows, rows * turns), (lanes, rows)) as thread:
        buffers = {b: T.alloc_buffer((rows * sizes[b],), str(b.dtype), scope="shared") for b in passed_on}
        row_memory = {b: (buffer, thread.y * sizes[b]) for b, buffer in buffers.items()}
        parts = [_RowStage(stage, shared, row_memory, thread, device) for stage in stages]
        with T.serial(turns) as turn:
            flat = keep((thread.block * const(turns) + turn) * rows + thread.y)
            # Rows past the last repeat it: same values to the same places, and all threads arrive at the barriers.
            flat = flat if below(flat, all_rows, rows * turns) is True else tirx.min(flat, const(1) * all_rows - 1)
            places = list(bind_axes(stages[0].axes[:shared], flat).values())
            for position, part in enumerate(parts):
                if position:
                    barrier()
                part.emit(places)
            if turns > 1:
                barrier()


def _turns(groups: Expr, device: Device) -> int:
    """How many rows a row of threads does, one after the other: as many as leave two rounds of threadgroups."""
    if not isinstance(groups, int):
        return 1
    return next(turns for turns in (8, 4, 2, 1) if turns == 1 or groups >= 2 * turns * device.concurrent)


def _read_once(stages: Sequence[Stage], kept: Sequence[tirx.Buffer], shared: int, most_bytes: int) -> Sequence[Stage]:
    """The stages, preceded by copies of the rows that they read several times from device memory, where these fit.

    most_bytes: for all that the stages of a row keep in shared memory.
    """
    made = {stage.buffer for stage in stages}
    own = [buffer for buffer in made if not any(buffer.same_as(k) for k in kept)]
    room = most_bytes - sum(_row_bytes(buffer, shared) or most_bytes for buffer in own)
    found: dict[tirx.Buffer, list[bool]] = {}  # of each tensor: whether they are of the stage's own row
    for stage in stages:
        for read in loads_of(stage.value):
            if read.source not in made:
                along = zip(read.indices[:shared], stage.indices[:shared], strict=False)
                of_row = len(read.indices) > shared and all(index.same_as(own) for index, own in along)
                found.setdefault(read.source, []).append(of_row)
    copies: dict[tirx.Buffer, Stage] = {}
    for source, at_row in found.items():
        size = _row_bytes(source, shared)
        if len(at_row) > 1 and all(at_row) and size is not None and size <= room:
            room -= size
            axes = tuple(Axis(tirx.Var(f"r{i}", "int64"), extent) for i, extent in enumerate(source.shape))
            copy = tirx.decl_buffer(source.shape, str(source.dtype), f"{source.name}_row")
            copies[source] = Stage(copy, axes, load(source, [axis.var for axis in axes]))

    def moved(read: ir.TensorLoad) -> ir.TensorLoad:
        return load(copies[read.source].buffer, read.indices) if read.source in copies else read

    rest = [
        replace(stage, value=tvm_ffi.structural_map(stage.value, (ir.TensorLoad, moved), order="post"))
        for stage in stages
    ]
    return [*copies.values(), *rest]


def _row_bytes(buffer: tirx.Buffer, shared: int) -> int | None:
    """Bytes of a row, None where its extents are not known."""
    extents = list(buffer.shape[shared:])
    if not all(isinstance(extent, tirx.IntImm) for extent in extents):
        return None
    return prod(map(int, extents)) * DataType(str(buffer.dtype)).itemsize


RowMemory = tuple[tirx.Buffer, Expr]
"""A flat buffer in shared memory and where this thread's row begins in it."""


def _row_offset(axes_extents: Sequence[Expr], indices: Sequence[Expr]) -> Expr:
    offset: Expr = const(0)
    for extent, index in zip(axes_extents, indices, strict=True):
        offset = offset * extent + index
    return offset


def _with_row_memory(stage: Stage, memory: dict[tirx.Buffer, RowMemory], shared: int) -> Stage:
    def moved(read: ir.TensorLoad) -> ir.TensorLoad:
        if read.source not in memory:
            return read
        buffer, start = memory[read.source]
        return load(buffer, [start + _row_offset(read.source.shape[shared:], read.indices[shared:])])

    return replace(stage, value=tvm_ffi.structural_map(stage.value, (ir.TensorLoad, moved), order="post"))


class _RowStage:
    """The statements of one stage for one row; open only inside a launch."""

    def __init__(
        self, stage: Stage, shared: int, row_memory: dict[tirx.Buffer, RowMemory], thread: Thread, device: Device
    ) -> None:
        self.stage, self.thread, self.device = _with_row_memory(stage, row_memory, shared), thread, device
        self.rows, self.own = stage.axes[:shared], stage.axes[shared:]
        self.memory = row_memory.get(stage.buffer)
        self.run: RunStage | None = None
        self.fixed: list[Read] = []
        if may_run(self.stage, self.own, in_memory=self.memory is not None):
            self.run = RunStage(self.stage, self.own, device, self.memory)
            if count(self.own) <= LANES * thread.size[0]:
                own = [buffer for buffer, _ in row_memory.values()]
                varying = {axis.var for axis in self.rows}
                self.fixed = [
                    read
                    for read in self.run.reads
                    if not read.axes & varying and not any(read.source.same_as(buffer) for buffer in own)
                ]
                self._fetch_fixed(self.run)

    def _fetch_fixed(self, run: RunStage) -> None:
        """Reads into registers what all rows have in common: a thread has one run of each."""
        size, first = count(self.own), keep(self.thread.x * LANES)
        with when(below(first, size, LANES * self.thread.size[0])):
            run.fetch(self.fixed, first, {})

    def emit(self, places: Sequence[Expr]) -> None:
        """The row at these places of the shared axes."""
        bound = dict(zip((axis.var for axis in self.rows), places, strict=True))
        if self.stage.reduction:
            self._reduce(bound)
        elif self.run is not None:
            run = self.run
            varying = [read for read in run.reads if read not in self.fixed]
            self._deal(LANES, lambda first: run.emit(first, bound, varying))
        else:
            self._deal(1, lambda flat: self._element({**bound, **bind_axes(self.own, flat)}))

    def _deal(self, lanes: int, emit: Callable[[Expr], None]) -> None:
        """Every run of so many elements of the row to a thread."""
        size, threads = count(self.own), self.thread.size[0]
        with T.serial(ceil_div(size, lanes * threads)) as round_:
            first = keep((round_ * threads + self.thread.x) * lanes)
            with when(below(first, size, lanes * threads)):
                emit(first)

    def _element(self, at: Bound) -> None:
        self._write(at, substitute(self.stage.value, at))

    def _write(self, at: Bound, value: Expr) -> None:
        if self.memory is None:
            put(self.device, self.stage.buffer, [at[axis.var] for axis in self.stage.axes], value)
        else:
            buffer, start = self.memory
            offset = _row_offset([axis.extent for axis in self.own], [at[axis.var] for axis in self.own])
            put(self.device, buffer, [start + offset], value)

    def _reduce(self, bound: Bound) -> None:
        stage, thread, lanes = self.stage, self.thread, self.thread.size[0]
        total = registers(1, accumulator_type(stage.buffer))
        with T.serial(prod(axis.size or 1 for axis in self.own)) as output:
            at = {**bound, **bind_axes(self.own, output)}
            _reduce_part(stage, at, thread.x, lanes, total, self.device)
            _combine_parts(stage, thread.index, thread.x, lanes, 1, total)
            with when(thread.x == 0):
                self._write(at, load(total, [0]))
