"""Loops for element-wise, movement and reduction stages: parallel over rows, vectorised within one.

A row is everything but the axis the lanes run along: the innermost output axis, or the innermost reduction axis where
that is the one memory is contiguous in. Stages that share their leading axes (softmax, the normalisations) run row by
row together, and what they hand on to each other stays in a row-sized buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import tvm_ffi
from tvm import ir, tirx

from attnrewrite.lowering.schedules.loops import (
    Stmt,
    allocated,
    as_dtype,
    const,
    local,
    loop,
    nest,
    parallel,
    seq,
    store,
    unravel,
    vectorized,
)
from attnrewrite.lowering.schedules.stages import (
    Axis,
    Expr,
    Stage,
    loads_of,
    product,
    same,
    simplify,
    stride,
    substitute,
)

Bound = Mapping[tirx.Var, Expr]

# Stores the value of one output element, given where the row's own axes are.
Put = Callable[[Expr, Bound], Stmt]

# Vectors a reduction keeps in flight: enough to hide the latency of an addition. Where a sum reads one operand only, it
# waits for memory, and longer pieces of a row are better.
VECTORS = 4
STREAMED_VECTORS = 12


def lower_stage(stage: Stage, lanes: int) -> Stmt:
    """Loops of one stage on its own."""
    lane_axis = _lane_axis(stage)
    rows = stage.axes[:-1] if stage.axes and lane_axis is stage.axes[-1] else stage.axes
    extents = [axis.extent for axis in rows]
    work = product([axis.extent for axis in (*stage.axes, *stage.reduction)])

    def row(p: Expr) -> Stmt:
        return _row(stage, dict(zip((a.var for a in rows), unravel(p, extents), strict=True)), lanes)

    return parallel(product(extents), row, work)


def lower_rows(stages: Sequence[Stage], kept: Sequence[tirx.Buffer], lanes: int) -> Stmt | None:
    """Loops of stages that share their leading axes; None where they share none."""
    shared = _shared_axes(stages)
    if shared == 0 or len(stages) < 2:
        return None
    extents = [axis.extent for axis in stages[0].axes[:shared]]
    row_buffers = {
        stage.buffer: _row_buffer(stage.buffer, shared)
        for stage in stages
        if not any(stage.buffer.same_as(k) for k in kept)
    }
    moved = [_with_row_buffers(stage, row_buffers, shared) for stage in stages]
    work = product(extents) * sum(product([a.extent for a in (*s.axes[shared:], *s.reduction)]) for s in stages)

    def row(p: Expr) -> Stmt:
        at = unravel(p, extents)
        body = []
        for stage in moved:
            bound = dict(zip((a.var for a in stage.axes[:shared]), at, strict=True))
            body.append(
                _row(replace(stage, axes=stage.axes[shared:]), bound, lanes, [*stage.axes[:shared]], row_buffers)
            )
        return seq(*(tirx.AllocBuffer(buffer) for buffer in row_buffers.values()), *body)

    return parallel(product(extents), row, simplify(work))


def _shared_axes(stages: Sequence[Stage]) -> int:
    """How many leading axes all stages have in common, each reading the others only at its own position along them."""
    # The axis that lanes run along is no row.
    return agreed_axes(stages, min(len(stage.axes) - lanes_along_output(stage) for stage in stages))


def lanes_along_output(stage: Stage) -> bool:
    """Whether lanes run along the last axis of what the stage computes."""
    return bool(stage.axes) and _lane_axis(stage) is stage.axes[-1]


def agreed_axes(stages: Sequence[Stage], shared: int) -> int:
    """How many of the first `shared` axes all stages have in common, reading one another at the same place there."""
    shared = next(
        (n for n in range(shared) if not all(same(stages[0].axes[n].extent, s.axes[n].extent) for s in stages)), shared
    )
    buffers = {stage.buffer for stage in stages}
    for stage in stages:
        own = stage.indices
        for load in loads_of(stage.value):
            if load.source in buffers:
                shared = next((n for n in range(shared) if not load.indices[n].same_as(own[n])), shared)
    return shared


def _row_buffer(buffer: tirx.Buffer, shared: int) -> tirx.Buffer:
    shape = [*buffer.shape[shared:]] or [const(1)]
    small = all(isinstance(e, tirx.IntImm) for e in shape) and int(product(shape)) <= 64
    return tirx.decl_buffer(shape, buffer.dtype, buffer.name, scope="local" if small else "global")


def _with_row_buffers(stage: Stage, row_buffers: Mapping[tirx.Buffer, tirx.Buffer], shared: int) -> Stage:
    def moved(load: ir.TensorLoad) -> ir.TensorLoad:
        if load.source not in row_buffers:
            return load
        return tirx.BufferLoad(row_buffers[load.source], [*load.indices[shared:]] or [const(0)])

    return replace(stage, value=tvm_ffi.structural_map(stage.value, (ir.TensorLoad, moved), order="post"))


def _row(
    stage: Stage,
    bound: Bound,
    lanes: int,
    leading: Sequence[Axis] = (),
    row_buffers: Mapping[tirx.Buffer, tirx.Buffer] | None = None,
) -> Stmt:
    """One row of a stage; axes not in `bound` are looped over here. `leading` axes go before its own indices."""
    row_buffer = (row_buffers or {}).get(stage.buffer)

    def put(value: Expr, at: Bound) -> Stmt:
        where = {**bound, **at}
        indices = [where[axis.var] for axis in stage.axes]
        if row_buffer is not None:
            return store(row_buffer, value, indices or [const(0)])
        return store(stage.buffer, value, [*(bound[a.var] for a in leading), *indices])

    lane_axis = _lane_axis(stage)
    free = [axis for axis in stage.axes if axis.var not in bound]
    along_row = bool(free) and lane_axis is stage.axes[-1]
    outer = free[:-1] if along_row else free

    def inner(at: Sequence[Expr]) -> Stmt:
        where = {**bound, **dict(zip((a.var for a in outer), at, strict=True))}
        if not stage.reduction:
            if not along_row:
                return put(substitute(stage.value, where), where)

            def element(x: Expr) -> Stmt:
                at_x = {**where, stage.axes[-1].var: x}
                return put(substitute(stage.value, at_x), at_x)

            return _tiles(stage.axes[-1], lanes, element)
        if along_row:
            return _reduce_lanes_apart(stage, where, lanes, put)
        if lane_axis is not None:
            return _reduce_across_lanes(stage, where, lanes, put)
        return _reduce_scalar(stage, where, put)

    return nest(outer, inner)


def _tiles(axis: Axis, lanes: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """`body(x)` for every x of an axis, `lanes` at a time; a last partial vector overlaps the one before it."""
    size = axis.size
    if size is None:
        vectors = tirx.floordiv(axis.extent, lanes)
        whole = loop(vectors, lambda t: vectorized(lanes, lambda lane: body(t * lanes + lane)), name="t")
        rest = loop(tirx.floormod(axis.extent, lanes), lambda i: body(axis.extent - 1 - i))
        return seq(whole, rest)
    width = min(lanes, size)
    whole = loop(size // width, lambda t: vectorized(width, lambda lane: body(t * width + lane)), name="t")
    if size % width == 0:
        return whole
    return seq(whole, vectorized(width, lambda lane: body(const(size - width) + lane)))


def _lane_axis(stage: Stage) -> Axis | None:
    """The axis whose neighbours lie side by side in memory for every read, the innermost output axis by preference."""
    if not stage.reduction:
        return stage.axes[-1] if stage.axes else None
    loads = loads_of(stage.value)
    candidates = [axis for axis in (*stage.axes[-1:], stage.reduction[-1]) if axis.size is None or axis.size >= 4]
    for axis in candidates:
        if all(stride(load, axis.var) in (0, 1) for load in loads):
            return axis
    return candidates[0] if candidates and candidates[0] in stage.axes else None


def combine(how: str, left: Expr, right: Expr) -> Expr:
    if how == "sum":
        return left + right
    if how == "prod":
        return left * right
    return tirx.max(left, right) if how == "max" else tirx.min(left, right)


def _accumulator_dtype(stage: Stage) -> str:
    """Sums of half-precision numbers are kept in single precision."""
    dtype = str(stage.buffer.dtype)
    return "float32" if dtype == "float16" else dtype


def _reduce_lanes_apart(stage: Stage, where: Bound, lanes: int, put: Put) -> Stmt:
    """Every lane reduces an output element of its own."""
    axis = stage.axes[-1]
    dtype = _accumulator_dtype(stage)
    if axis.size is None:
        return loop(axis.extent, lambda x: _reduce_scalar(stage, {**where, axis.var: x}, put))
    width = min(lanes, axis.size)
    most = VECTORS if len(loads_of(stage.value)) > 1 else STREAMED_VECTORS
    vectors = min(most, axis.size // width)

    def tile(start: Expr, count: int) -> Stmt:
        sums = local([count * width], dtype, "sums")

        def step(at: Sequence[Expr]) -> Stmt:
            def at_lane(lane: Expr) -> Stmt:
                mapping = {
                    **where,
                    axis.var: start + lane,
                    **dict(zip((a.var for a in stage.reduction), at, strict=True)),
                }
                term = as_dtype(substitute(stage.value, mapping), dtype)
                return store(sums, combine(stage.combine, tirx.BufferLoad(sums, [lane]), term), [lane])

            return vectorized(count * width, at_lane)

        return allocated(
            sums,
            vectorized(count * width, lambda lane: store(sums, as_dtype(stage.init, dtype), [lane])),
            nest(stage.reduction, step),
            vectorized(
                count * width,
                lambda lane: put(
                    as_dtype(tirx.BufferLoad(sums, [lane]), str(stage.buffer.dtype)), {**where, axis.var: start + lane}
                ),
            ),
        )

    span = width * vectors
    body = [loop(axis.size // span, lambda t: tile(t * span, vectors), name="t")]
    left = axis.size % span
    if left // width:
        body.append(tile(const(axis.size - left), left // width))
    if left % width:
        body.append(tile(const(axis.size - width), 1))
    return seq(*body)


def _reduce_across_lanes(stage: Stage, where: Bound, lanes: int, put: Put) -> Stmt:
    """All lanes work on one output element; they are combined at the end."""
    *outer, axis = stage.reduction
    dtype = _accumulator_dtype(stage)
    width = lanes
    while axis.size is not None and width < VECTORS * lanes and axis.size >= 2 * width:
        width *= 2
    sums = local([width], dtype, "sums")
    total = local([1], dtype, "total")

    def update(at: Sequence[Expr], x: Expr, buffer: tirx.Buffer, slot: Expr) -> Stmt:
        mapping = {**where, axis.var: x, **dict(zip((a.var for a in outer), at, strict=True))}
        term = as_dtype(substitute(stage.value, mapping), dtype)
        return store(buffer, combine(stage.combine, tirx.BufferLoad(buffer, [slot]), term), [slot])

    def lanes_from(at: Sequence[Expr], start: Expr, count: int) -> Stmt:
        return vectorized(count, lambda lane: update(at, start + lane, sums, lane))

    def step(at: Sequence[Expr]) -> Stmt:
        whole = simplify(tirx.floordiv(axis.extent, width))
        body = [loop(whole, lambda t: lanes_from(at, t * width, width), name="t")]
        if axis.size is None:
            rest = simplify(tirx.floormod(axis.extent, width))
            body.append(loop(rest, lambda i: update(at, whole * width + i, total, const(0))))
            return seq(*body)
        done, narrower = axis.size // width * width, width
        while done < axis.size:
            # What is left of the row in ever shorter vectors.
            narrower //= 2
            if axis.size - done >= narrower:
                body.append(lanes_from(at, const(done), narrower))
                done += narrower
        return seq(*body)

    return allocated(
        sums,
        tirx.AllocBuffer(total),
        vectorized(width, lambda lane: store(sums, as_dtype(stage.init, dtype), [lane])),
        store(total, as_dtype(stage.init, dtype), [const(0)]),
        nest(outer, step),
        *_halvings(sums, width, stage.combine),
        store(
            total, combine(stage.combine, tirx.BufferLoad(total, [0]), tirx.BufferLoad(sums, [const(0)])), [const(0)]
        ),
        put(as_dtype(tirx.BufferLoad(total, [0]), str(stage.buffer.dtype)), where),
    )


def _halvings(sums: tirx.Buffer, width: int, how: str) -> list[Stmt]:
    """Combine all lanes into the first, half of them at a time; width is a power of two."""
    steps = []
    while width > 1:
        width //= 2

        def halve(lane: Expr, apart: int = width) -> Stmt:
            halves = tirx.BufferLoad(sums, [lane]), tirx.BufferLoad(sums, [lane + apart])
            return tirx.BufferStore(sums, combine(how, *halves), [lane])

        steps.append(vectorized(width, halve))
    return steps


def _reduce_scalar(stage: Stage, where: Bound, put: Put) -> Stmt:
    dtype = _accumulator_dtype(stage)
    total = local([1], dtype, "total")

    def step(at: Sequence[Expr]) -> Stmt:
        mapping = {**where, **dict(zip((a.var for a in stage.reduction), at, strict=True))}
        term = as_dtype(substitute(stage.value, mapping), dtype)
        return store(total, combine(stage.combine, tirx.BufferLoad(total, [0]), term), [const(0)])

    return allocated(
        total,
        store(total, as_dtype(stage.init, dtype), [const(0)]),
        nest(stage.reduction, step),
        put(as_dtype(tirx.BufferLoad(total, [0]), str(stage.buffer.dtype)), where),
    )
