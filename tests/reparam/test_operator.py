"""Composed and added operators against the operators themselves, evaluated tap by tap in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from attnrewrite.reparam.operator import Axis, Inexact, Operator, Scaling, add, compose, scaled, shifted, with_border

SIZE = (7, 11)
Shape = tuple[int, ...]


def operator(
    read: int, written: int, *axes: Axis, groups: int = 1, bias: bool = False, seed: int = 0, channel_axis: int = 1
) -> Operator:
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(written, read // groups, *(a.kernel for a in axes)))
    offsets = rng.normal(size=written)
    return Operator(read, written, groups, axes, channel_axis, lambda: kernel, (lambda: offsets) if bias else None)


def conv(read: int, written: int, size: int, pad: int = 0, stride: int = 1, dilation: int = 1, **more: int) -> Operator:
    axis = Axis(size, stride, dilation, pad, pad)
    return operator(read, written, axis, axis, **more)


def extents(size: Shape, axes: tuple[Axis, ...]) -> Shape:
    return tuple((n + a.begin + a.end - a.reach - 1) // a.stride + 1 for n, a in zip(size, axes, strict=True))


def apply(op: Operator, x: np.ndarray) -> np.ndarray:
    """x [B, I, *size] -> [B, O, *size of the result], by the sum that the module defines."""
    size = extents(x.shape[2:], op.axes)
    spatial = [(max(a.begin, 0), max(a.end, 0)) for a in op.axes]
    padded = np.pad(x, [(0, 0), (0, 0), *spatial])
    out = np.zeros((len(x), op.channels_out, *size))
    own, filters = op.channels_in // op.groups, op.channels_out // op.groups
    for tap in itertools.product(*(range(a.kernel) for a in op.axes)):
        at = []
        for t, a, n in zip(tap, op.axes, size, strict=True):
            start = t * a.dilation - min(a.begin, 0)
            at.append(slice(start, start + (n - 1) * a.stride + 1, a.stride))
        part = padded[(..., *at)]
        for group in range(op.groups):
            rows = slice(group * filters, (group + 1) * filters)
            weights = op.kernel()[(rows, slice(None), *tap)]
            out[:, rows] += np.einsum("oi,bi...->bo...", weights, part[:, group * own : (group + 1) * own])
    return out + op.bias_or_zero().reshape(-1, *[1] * len(op.axes))


def image(channels: int, size: Shape = SIZE) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(2, channels, *size))


def chained(outer: Operator | Scaling, inner: Operator | Scaling, x: np.ndarray) -> tuple[object, np.ndarray]:
    """The composed operator, and outer(inner(x))."""
    middle = evaluated(inner, x)
    result = evaluated(outer, middle)
    return compose(outer, inner, x.shape, middle.shape, result.shape), result


def evaluated(op: Operator | Scaling, x: np.ndarray) -> np.ndarray:
    return op.factor * x + op.offset if isinstance(op, Scaling) else apply(op, x)


CROP = operator(6, 6, Axis(begin=-1, end=-2), Axis(begin=0, end=-1), groups=6)
CHAINS: dict[str, tuple[Operator | Scaling, Operator | Scaling]] = {
    "pointwise-then-padded": (conv(8, 4, 3, pad=1), conv(6, 8, 1)),
    "padded-then-pointwise": (conv(8, 4, 1, bias=True), conv(6, 8, 3, pad=1, bias=True)),
    "two-kernels-unpadded": (conv(4, 6, 3, bias=True), conv(6, 4, 2, bias=True)),
    "strides-and-dilations": (conv(4, 6, 2, stride=2, dilation=2), conv(6, 4, 3, stride=2, bias=True)),
    "pointwise-then-strided": (conv(6, 8, 5, pad=2, stride=2), conv(6, 6, 1)),
    "strided-pointwise-then-kernel": (conv(6, 6, 2), conv(6, 6, 1, stride=3)),
    "strided-pointwise-then-padded": (conv(8, 4, 3, pad=1), conv(6, 8, 1, stride=2)),
    "groups-of-two-and-three": (conv(12, 6, 3, groups=3), conv(12, 12, 1, groups=2)),
    "depthwise-then-dense": (conv(12, 6, 1), conv(6, 12, 3, pad=1, groups=6, bias=True)),
    "dense-then-depthwise": (conv(6, 6, 3, groups=6), conv(4, 6, 1, bias=True)),
    "depthwise-then-depthwise": (conv(6, 6, 3, groups=6), conv(6, 6, 2, groups=6, bias=True)),
    "depthwise-then-groups": (conv(6, 4, 3, groups=2), conv(6, 6, 2, groups=6, bias=True)),
    "crop-of-a-kernel": (CROP, conv(4, 6, 3, pad=2, bias=True)),
    "kernel-of-a-crop": (conv(6, 4, 3), CROP),
    "two-numbers-outside": (Scaling(-2.0, 0.5), conv(6, 4, 3, pad=1, bias=True)),
    "two-numbers-inside": (conv(6, 4, 3), Scaling(-2.0, 0.5)),
    "a-factor-before-padding": (conv(6, 4, 3, pad=1), Scaling(-2.0)),
    "two-numbers-twice": (Scaling(3.0, 1.0), Scaling(-2.0, 0.5)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_composed(name: str) -> None:
    outer, inner = CHAINS[name]
    channels = 6 if isinstance(inner, Scaling) else inner.channels_in
    x = image(channels)
    composed, expected = chained(outer, inner, x)
    assert isinstance(composed, (Operator, Scaling))
    np.testing.assert_allclose(evaluated(composed, x), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


AFTER_A_BIAS = "zero padding after a bias"
BEYOND = "zero padding after a kernel that reaches beyond it"
BORDERS: dict[str, tuple[Operator, Operator | Scaling, str]] = {
    "pointwise-with-bias": (conv(8, 4, 3, pad=1), conv(6, 8, 1, bias=True), AFTER_A_BIAS),
    "an-offset": (conv(6, 4, 3, pad=1), Scaling(1.0, 0.5), AFTER_A_BIAS),
    "padded-twice": (conv(8, 4, 3, pad=1), conv(6, 8, 3, pad=1), BEYOND),
    "padding-after-a-kernel": (conv(8, 4, 3, pad=1), conv(6, 8, 3), BEYOND),
    "padding-at-the-end-alone": (
        operator(8, 4, Axis(2, end=1), Axis(2, end=1)),
        operator(6, 8, Axis(2, begin=1), Axis(2, begin=1)),
        BEYOND,
    ),
    "padding-after-a-crop": (operator(6, 4, Axis(3, begin=1, end=1), Axis()), CROP, BEYOND),
}


@pytest.mark.parametrize("name", BORDERS)
def test_a_border_that_would_change_is_declined(name: str) -> None:
    outer, inner, reason = BORDERS[name]
    found, _ = chained(outer, inner, image(6))
    assert found == Inexact(reason)


def test_rows_of_a_matrix_product() -> None:
    outer, inner = operator(8, 5, channel_axis=2, bias=True), operator(6, 8, channel_axis=2, bias=True)
    composed = compose(outer, inner, (2, 3, 6), (2, 3, 8), (2, 3, 5))
    assert isinstance(composed, Operator)
    np.testing.assert_allclose(composed.kernel(), outer.kernel() @ inner.kernel(), atol=1e-13)
    np.testing.assert_allclose(composed.bias_or_zero(), outer.kernel() @ inner.bias_or_zero() + outer.bias_or_zero())


def test_channels_along_different_axes_do_not_combine() -> None:
    rows, map_ = operator(6, 6, channel_axis=3), conv(6, 6, 1)
    assert isinstance(compose(rows, map_, (2, 6, 7, 6), (2, 6, 7, 6), (2, 6, 7, 6)), Inexact)
    assert isinstance(add([rows, map_]), Inexact)


@dataclass(frozen=True)
class Sum:
    terms: tuple[Operator | Scaling, ...]
    groups: int = 1


SUMS: dict[str, Sum] = {
    "kernels-around-a-centre": Sum((conv(6, 6, 3, pad=1), conv(6, 6, 1, bias=True), conv(6, 6, 5, pad=2))),
    "the-input-itself": Sum((conv(6, 6, 3, pad=1, groups=3), Scaling()), groups=3),
    "two-numbers": Sum((Scaling(-0.5, 2.0), conv(6, 6, 3, pad=1, groups=6, bias=True)), groups=6),
    "depthwise-and-dense": Sum((conv(6, 6, 3, pad=1, groups=6), conv(6, 6, 1))),
    "groups-of-two-and-three": Sum((conv(6, 6, 1, groups=2), conv(6, 6, 1, groups=3, bias=True))),
    "off-centre": Sum(
        (
            operator(6, 6, Axis(3, begin=2), Axis(3, begin=0, end=2)),
            operator(6, 6, Axis(2, begin=0, end=1), Axis(1)),
        )
    ),
    "dilated": Sum((conv(6, 6, 3, pad=2, dilation=2), conv(6, 6, 3, pad=1))),
    "dilated-alike": Sum((conv(6, 6, 3, pad=2, dilation=2), conv(6, 6, 5, pad=4, dilation=2))),
    "strided": Sum((conv(6, 6, 3, pad=1, stride=2), conv(6, 6, 1, stride=2))),
    "even": Sum((conv(6, 6, 4, pad=1, stride=2), conv(6, 6, 2, stride=2))),
}


@pytest.mark.parametrize("name", SUMS)
def test_added(name: str) -> None:
    case = SUMS[name]
    x = image(6, (8, 12))
    total = add([scaled(term, sign) for term, sign in zip(case.terms, itertools.cycle((1, -1)), strict=False)])
    assert isinstance(total, Operator)
    assert total.groups == case.groups
    parts = [sign * evaluated(t, x) for t, sign in zip(case.terms, itertools.cycle((1, -1)), strict=False)]
    expected = sum(parts[1:], parts[0])
    np.testing.assert_allclose(apply(total, x), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_different_strides_and_channels_do_not_add() -> None:
    assert add([conv(6, 6, 1), conv(6, 6, 1, stride=2)]) == Inexact("the branches have different strides")
    assert add([conv(6, 6, 1), conv(6, 8, 1)]) == Inexact("the branches have different channels")


def test_constants_per_channel_become_bias() -> None:
    x, offset = image(6), operator(6, 6, Axis(), Axis(), groups=6, bias=True)
    total = shifted(conv(6, 6, 3, pad=1, bias=True), offset, -1)
    assert isinstance(total, Operator)
    expected = apply(conv(6, 6, 3, pad=1, bias=True), x) - offset.bias_or_zero().reshape(-1, 1, 1)
    np.testing.assert_allclose(apply(total, x), expected, atol=1e-12)


def test_a_border_of_the_bias_is_exact() -> None:
    """Zeros around x give the bias there, so padding with the bias only widens what x is continued by."""
    x, inner = image(6), conv(6, 4, 1, bias=True)
    y = apply(inner, x)
    padded = with_border(inner, inner.bias_or_zero(), (1, 2), (0, 1), x.shape, y.shape, tolerance=0.0)
    assert isinstance(padded, Operator)
    expected = np.tile(inner.bias_or_zero().reshape(1, -1, 1, 1), (2, 1, 8, 14))
    expected[:, :, 1:, 2:-1] = y
    np.testing.assert_allclose(apply(padded, x), expected, atol=1e-12)


@pytest.mark.parametrize(("kernel", "border"), [(1, 0.0), (3, 1.0)])
def test_another_border_is_declined(kernel: int, border: float) -> None:
    """Zeros instead of the bias; and the bias around a kernel that would read the image there."""
    x, inner = image(6), conv(6, 4, kernel, bias=True)
    found = with_border(inner, border * inner.bias_or_zero(), (1, 1), (1, 1), x.shape, apply(inner, x).shape, 1e-6)
    assert isinstance(found, Inexact)
