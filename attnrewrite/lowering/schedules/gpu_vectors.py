"""Where neighbouring elements of a tensor can be moved at once."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from attnrewrite.lowering.schedules.loops import const
from attnrewrite.lowering.schedules.stages import Axis, Expr, simplify, substitute

LANES = 4


def address(buffer: tirx.Buffer, indices: Sequence[Expr]) -> Expr:
    """The row-major flat index of an element."""
    flat: Expr = const(0)
    for index, extent in zip(indices, buffer.shape, strict=True):
        flat = flat * extent + index
    return flat


def runs_in_lanes(buffer: tirx.Buffer, indices: Sequence[Expr], axes: Sequence[Axis], lanes: int = LANES) -> bool:
    """Whether every `lanes` points of a row-major box, from a multiple of that many on, are neighbours in the buffer
    that begin at a multiple of it. indices: of the element, in the variables of the axes and others.

    False does not mean that they are not.
    """
    inner = next((axis for axis in reversed(axes) if axis.size != 1), None)
    if inner is None or inner.size is None or inner.size % lanes:
        return False
    group = tirx.Var("group", "int64")
    flat = address(buffer, indices)
    first = substitute(flat, {inner.var: group * lanes})
    if not _is(simplify(tirx.floormod(first, const(lanes))), 0):
        return False
    runs = (simplify(substitute(flat, {inner.var: group * lanes + lane}) - first) for lane in range(1, lanes))
    return all(_is(distance, lane) for lane, distance in enumerate(runs, start=1))


def _is(value: Expr, number: int) -> bool:
    return isinstance(value, tirx.IntImm) and int(value) == number
