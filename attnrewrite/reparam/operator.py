"""Linear operators that treat every position alike: what re-parameterised branches are made of, and how they combine.

An operator maps a feature map x to

    y[b, o, p] = sum over i, t of kernel[o, i, t] * x~[b, g(o) * I/groups + i, p * stride + t * dilation - begin]
                 + bias[o]

on the domain of y, where x~ is x continued by zeros and g(o) the group of output channel o. A convolution is one; so
are a BatchNorm, a scale, a mean over windows and a crop (begin < 0), and a matrix product without spatial axes.

Kernels and biases are computed in float64, and only when somebody asks for them: whether operators combine is decided
from their structure.

Letters: B batch, I and O channels read and written, p a position, t a tap of the kernel, N an extent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from attnrewrite.dims import Extent

Numbers = Callable[[], np.ndarray]
Index = tuple[Any, ...]


@dataclass(frozen=True)
class Axis:
    """One spatial axis: taps, steps, and zeros read before and after the input (negative: elements left out)."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    begin: int = 0
    end: int = 0

    @property
    def reach(self) -> int:
        """The distance from the first tap to the last, in elements of the input."""
        return (self.kernel - 1) * self.dilation

    def after(self, inner: Axis) -> Axis:
        """This axis applied to what the inner one gives; the result has the same extent, whatever that of the input."""
        own = self.dilation * inner.stride if self.kernel > 1 else 0
        dilation = math.gcd(own, inner.dilation if inner.kernel > 1 else 0) or 1
        return Axis(
            (self.reach * inner.stride + inner.reach) // dilation + 1,
            self.stride * inner.stride,
            dilation,
            self.begin * inner.stride + inner.begin,
            self.end * inner.stride + inner.end,
        )


@dataclass(frozen=True, eq=False)
class Operator:
    """kernel() -> float64 [O, I/groups, *taps]; bias() -> float64 [O], or None where there is none.

    channel_axis: of the values it maps, 1 or the last; axes: the spatial ones, from 2 on, none where channels are last.
    """

    channels_in: int
    channels_out: int
    groups: int
    axes: tuple[Axis, ...]
    channel_axis: int
    kernel: Numbers
    bias: Numbers | None = None

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel is computed from itself alone."""
        return self.groups == self.channels_in == self.channels_out

    @property
    def taps(self) -> int:
        return math.prod(a.kernel for a in self.axes)

    @property
    def products(self) -> int:
        """Multiplications for one output element."""
        return self.channels_in // self.groups * self.taps

    def bias_or_zero(self) -> np.ndarray:
        return np.zeros(self.channels_out) if self.bias is None else self.bias()


@dataclass(frozen=True)
class Scaling:
    """factor * x + offset, two numbers for all channels: it fits values of any layout. x itself is Scaling()."""

    factor: float = 1.0
    offset: float = 0.0

    def like(self, other: Operator, channels: int) -> Operator:
        """The same on values laid out as those of an operator, of so many channels."""
        return depthwise(
            np.full(channels, self.factor),
            np.full(channels, self.offset) if self.offset else None,
            other.channel_axis,
            len(other.axes),
        )


Linear = Operator | Scaling


@dataclass(frozen=True)
class Inexact:
    """Why two operators have no common one."""

    reason: str


def depthwise(factors: np.ndarray, offsets: np.ndarray | None, channel_axis: int, rank: int) -> Operator:
    """factors[c] * x[c] + offsets[c], on `rank` spatial axes."""
    channels = len(factors)
    return Operator(
        channels,
        channels,
        channels,
        (Axis(),) * rank,
        channel_axis,
        lambda: factors.reshape(channels, 1, *[1] * rank).astype(np.float64),
        None if offsets is None else lambda: offsets.astype(np.float64),
    )


Extents = Sequence[Extent]


def compose(outer: Linear, inner: Linear, source: Extents, middle: Extents, result: Extents) -> Linear | Inexact:
    """The operator outer(inner(x)).

    source, middle, result: the shapes of x, inner(x) and outer(inner(x)). Exact, or Inexact: where the outer operator
    reads zeros beyond the middle, the inner one must give zeros there too.
    """
    if isinstance(outer, Scaling):
        if isinstance(inner, Scaling):
            return Scaling(outer.factor * inner.factor, outer.factor * inner.offset + outer.offset)
        outer = outer.like(inner, inner.channels_out)
    if isinstance(inner, Scaling):
        if inner == Scaling():
            return outer
        inner = inner.like(outer, outer.channels_in)
    if outer.channel_axis != inner.channel_axis or outer.channels_in != inner.channels_out:
        return Inexact("the channels lie along different axes")
    sides = [
        (k, before)
        for k, (own, read) in enumerate(zip(outer.axes, inner.axes, strict=True))
        for before in (True, False)
        if _reads_beyond(own, before, middle[2 + k], result[2 + k])
    ]
    if sides and inner.bias is not None and inner.bias().any():
        return Inexact("zero padding after a bias")
    for k, before in sides:
        if not _zero_beyond(inner.axes[k], before, source[2 + k], middle[2 + k]):
            return Inexact("zero padding after a kernel that reaches beyond it")
    return _composed(outer, inner)


def with_border(
    inner: Operator,
    border: np.ndarray,
    begin: Sequence[int],
    end: Sequence[int],
    source: Extents,
    middle: Extents,
    tolerance: float,
) -> Operator | Inexact:
    """inner(x) with so many elements around it, all of them border[c] in channel c.

    source, middle: the shapes of x and inner(x). Exact where the border is the bias, up to tolerance * max |bias|, as
    models compute it in their own precision.
    """
    bias = inner.bias_or_zero()
    if np.abs(border - bias).max(initial=0.0) > tolerance * np.abs(bias).max(initial=0.0):
        return Inexact("a border that is not what the operator gives there")
    for k, axis in enumerate(inner.axes):
        for before, amount in ((True, begin[k]), (False, end[k])):
            if amount > 0 and not _zero_beyond(axis, before, source[2 + k], middle[2 + k]):
                return Inexact("a border around a kernel that reaches beyond it")
    axes = tuple(
        replace(a, begin=a.begin + b * a.stride, end=a.end + e * a.stride)
        for a, b, e in zip(inner.axes, begin, end, strict=True)
    )
    return replace(inner, axes=axes)


def _reads_beyond(axis: Axis, before: bool, extent: Extent, result: Extent) -> bool:
    """Whether an operator reads outside of its input on one side; True where that is not known."""
    if before:
        return axis.begin > 0
    if isinstance(extent, int) and isinstance(result, int):
        return (result - 1) * axis.stride + axis.reach - axis.begin >= extent
    return axis.end > 0


def _zero_beyond(axis: Axis, before: bool, source: Extent, result: Extent) -> bool:
    """Whether the kernel touches only zeros wherever it stands beyond the result on one side."""
    if before:
        return -axis.stride + axis.reach - axis.begin < 0
    if isinstance(source, int) and isinstance(result, int):
        return result * axis.stride - axis.begin >= source
    return axis.stride == 1 and axis.end >= axis.reach


def _composed(outer: Operator, inner: Operator) -> Operator:
    axes = tuple(o.after(i) for o, i in zip(outer.axes, inner.axes, strict=True))
    if outer.is_depthwise:
        groups = inner.groups
    elif inner.is_depthwise:
        groups = outer.groups
    else:
        groups = math.gcd(outer.groups, inner.groups)

    def bias() -> np.ndarray:
        kernel = outer.kernel().reshape(outer.groups, outer.channels_out // outer.groups, -1, outer.taps).sum(-1)
        through = np.einsum("goi,gi->go", kernel, inner.bias_or_zero().reshape(outer.groups, -1))
        return through.reshape(-1) + outer.bias_or_zero()

    return Operator(
        inner.channels_in,
        outer.channels_out,
        groups,
        axes,
        outer.channel_axis,
        cache(lambda: _convolved(outer, inner, axes, groups)),
        None if outer.bias is None and inner.bias is None else cache(bias),
    )


def _convolved(outer: Operator, inner: Operator, axes: Sequence[Axis], groups: int) -> np.ndarray:
    """The kernel of outer(inner(x)): every tap of one at every tap of the other."""
    taps = tuple(a.kernel for a in axes)
    kernel = np.zeros((outer.channels_out, inner.channels_in // groups, *taps))
    upper, lower = outer.kernel(), inner.kernel()
    steps = [i.dilation // a.dilation if i.kernel > 1 else 1 for i, a in zip(inner.axes, axes, strict=True)]
    for tap in itertools.product(*(range(a.kernel) for a in outer.axes)):
        starts = [
            t * o.dilation * i.stride // a.dilation
            for t, o, i, a in zip(tap, outer.axes, inner.axes, axes, strict=True)
        ]
        at: Index = tuple(
            slice(s, s + (i.kernel - 1) * step + 1, step) for s, i, step in zip(starts, inner.axes, steps, strict=True)
        )
        one: Index = tap
        matrix = upper[(..., *one)]
        kernel[(..., *at)] += _mixed(matrix, outer, lower, inner, groups)
    return kernel


def _mixed(matrix: np.ndarray, outer: Operator, lower: np.ndarray, inner: Operator, groups: int) -> np.ndarray:
    """One tap of the outer kernel [O, M/groups] times the inner kernel [M, I/groups, *taps]: [O, I/groups, *taps]."""
    ones = [1] * len(inner.axes)
    if outer.is_depthwise:
        return matrix.reshape(-1, 1, *ones) * lower
    if inner.is_depthwise:
        factors = np.repeat(lower.reshape(groups, -1, *lower.shape[2:]), outer.channels_out // groups, axis=0)
        return matrix.reshape(*matrix.shape, *ones) * factors
    left = regrouped(matrix, outer.groups, groups).reshape(groups, outer.channels_out // groups, -1)
    right = regrouped(lower, inner.groups, groups).reshape(groups, inner.channels_out // groups, -1)
    return (left @ right).reshape(outer.channels_out, inner.channels_in // groups, *lower.shape[2:])


def regrouped(kernel: np.ndarray, groups: int, wanted: int) -> np.ndarray:
    """A kernel [O, I/groups, *taps] of fewer groups, [O, I/wanted, *taps], with zeros where it did not read."""
    if groups == wanted:
        return kernel
    joined, filters, own, taps = groups // wanted, len(kernel) // groups, kernel.shape[1], kernel.shape[2:]
    blocks = kernel.reshape(wanted, joined, filters, own, *taps)
    wide = np.zeros((wanted, joined, filters, joined, own, *taps))
    for k in range(joined):
        wide[:, k, :, k] = blocks[:, k]
    return wide.reshape(len(kernel), joined * own, *taps)


def scaled(operator: Linear, factor: float) -> Linear:
    """factor * operator(x)."""
    if factor == 1:
        return operator
    if isinstance(operator, Scaling):
        return Scaling(operator.factor * factor, operator.offset * factor)
    kernel, bias = operator.kernel, operator.bias
    return replace(
        operator,
        kernel=cache(lambda: factor * kernel()),
        bias=None if bias is None else cache(lambda: factor * bias()),
    )


def shifted(operator: Linear, offset: Linear, sign: int) -> Linear | Inexact:
    """operator(x) + sign * c, of the constants c that x -> x + c adds."""
    if isinstance(offset, Scaling):
        if isinstance(operator, Scaling):
            return Scaling(operator.factor, operator.offset + sign * offset.offset)
        offset = offset.like(operator, operator.channels_out)
    if isinstance(operator, Scaling):
        operator = operator.like(offset, offset.channels_in)
    if operator.channel_axis != offset.channel_axis:
        return Inexact("the channels lie along different axes")
    own, other = operator, offset
    return replace(operator, bias=cache(lambda: own.bias_or_zero() + sign * other.bias_or_zero()))


def add(terms: Sequence[Linear]) -> Linear | Inexact:
    """The sum of operators on one value whose results have the same shape."""
    like = next((t for t in terms if isinstance(t, Operator)), None)
    if like is None:
        scalings = [t for t in terms if isinstance(t, Scaling)]
        return Scaling(sum(t.factor for t in scalings), sum(t.offset for t in scalings))
    parts = [t if isinstance(t, Operator) else t.like(like, like.channels_in) for t in terms]
    if any(p.channel_axis != like.channel_axis for p in parts):
        return Inexact("the channels lie along different axes")
    if any((p.channels_in, p.channels_out) != (like.channels_in, like.channels_out) for p in parts):
        return Inexact("the branches have different channels")
    if any([a.stride for a in p.axes] != [a.stride for a in like.axes] for p in parts):
        return Inexact("the branches have different strides")
    groups = math.gcd(*(p.groups for p in parts))
    axes = tuple(_union(column) for column in zip(*(p.axes for p in parts), strict=True))
    return Operator(
        like.channels_in,
        like.channels_out,
        groups,
        axes,
        like.channel_axis,
        cache(lambda: _total([_embedded(p, axes, groups) for p in parts])),
        cache(lambda: _total([p.bias_or_zero() for p in parts])) if any(p.bias is not None for p in parts) else None,
    )


def _total(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return sum(arrays[1:], arrays[0])


def _union(axes: Sequence[Axis]) -> Axis:
    """The axis of a kernel that holds the taps of all: from the first that any reads to the last."""
    begin = max(a.begin for a in axes)
    last = max(a.reach - a.begin for a in axes)
    steps = [a.dilation for a in axes if a.kernel > 1] + [begin - a.begin for a in axes]
    dilation = math.gcd(*steps) or 1
    first = axes[0]  # its result has the extent that is asked for
    end = first.end + last - (first.reach - first.begin)
    return Axis((begin + last) // dilation + 1, first.stride, dilation, begin, end)


def _embedded(part: Operator, axes: Sequence[Axis], groups: int) -> np.ndarray:
    """The kernel among the taps of a larger one."""
    kernel = regrouped(part.kernel(), part.groups, groups)
    wide = np.zeros((*kernel.shape[:2], *(a.kernel for a in axes)))
    at: Index = ()
    for own, axis in zip(part.axes, axes, strict=True):
        start, step = (axis.begin - own.begin) // axis.dilation, own.dilation // axis.dilation if own.kernel > 1 else 1
        at = (*at, slice(start, start + (own.kernel - 1) * step + 1, step))
    wide[(..., *at)] = kernel
    return wide
