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
    flat, run, inner = address(buffer, indices), 1, []
    for axis in reversed(axes):
        if run % lanes == 0 or axis.size is None:
            break
        if axis.size > 1 and not _is(simplify(substitute(flat, {axis.var: axis.var + 1}) - flat), run):
            break
        run *= axis.size
        inner.append(axis.var)
    if run % lanes:
        return False
    first = substitute(flat, dict.fromkeys(inner, const(0)))
    return _is(simplify(tirx.floormod(first, const(lanes))), 0)


def _is(value: Expr, number: int) -> bool:
    return isinstance(value, tirx.IntImm) and int(value) == number
