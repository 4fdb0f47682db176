"""Every indexing rule against the operator itself, run on an iota."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from attnrewrite.indexing.map import identity
from attnrewrite.indexing.provenance import provenances
from attnrewrite.indexing.rules import RULES
from tests.indexing.oracle import Chain

INT64_MAX, INT64_MIN = np.iinfo(np.int64).max, np.iinfo(np.int64).min


def one_hot(*taps: tuple[int, int], kernel: tuple[int, int]) -> np.ndarray:
    """[filters, 1, kh, kw] with one 1 each."""
    weight = np.zeros((len(taps), 1, *kernel), np.int64)
    for row, tap in enumerate(taps):
        weight[(row, 0, *tap)] = 1
    return weight


def applied(*shape: int, op: str, operands: tuple[object, ...] = (), **options: object) -> Callable[[], Chain]:
    def build() -> Chain:
        chain = Chain(*shape)
        chain.op(op, *operands, **options)  # type: ignore[arg-type]
        return chain

    return build


def slice_(
    *shape: int, starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int] | None = None
) -> Callable[[], Chain]:
    operands = [
        np.array(starts),
        np.array(ends),
        None if axes is None else np.array(axes),
        None if steps is None else np.array(steps),
    ]
    while operands[-1] is None:
        operands.pop()
    return applied(*shape, op="Slice", operands=tuple(operands))


def pad(
    *shape: int, pads: list[int], mode: str = "constant", number: int | None = None, axes: list[int] | None = None
) -> Callable[[], Chain]:
    operands = [np.array(pads), None if number is None else np.array(number), None if axes is None else np.array(axes)]
    while operands[-1] is None:
        operands.pop()
    return applied(*shape, op="Pad", operands=tuple(operands), mode=mode)


def conv(channels: int, height: int, width: int, weight: np.ndarray, **attributes: object) -> Callable[[], Chain]:
    return applied(2, channels, height, width, op="Conv", operands=(weight,), group=channels, **attributes)


def col2im(
    batch: int, channels: int, blocks: int, *, image: tuple[int, ...], block: tuple[int, ...], **attributes: object
) -> Callable[[], Chain]:
    """`blocks` blocks in all, put back into an image."""
    operands = (np.array(image), np.array(block))
    return applied(batch, channels * math.prod(block), blocks, op="Col2Im", operands=operands, **attributes)


def conv_patches(
    channels: int, height: int, width: int, weight: np.ndarray, **attributes: object
) -> Callable[[], Chain]:
    return applied(2, channels, height, width, op="Conv", operands=(weight,), **attributes)


# Every tap of a 2 x 3 kernel of both channels, as image patches are cut: [12, 2, 2, 3].
PATCHES = np.eye(12, dtype=np.int64).reshape(12, 2, 2, 3)
TAPS = one_hot((0, 0), (1, 2), (2, 1), (0, 1), (2, 2), (1, 1), kernel=(3, 3))

CASES: dict[str, Callable[[], Chain]] = {
    "identity": applied(2, 3, op="Identity"),
    # Reshape and its relatives.
    "reshape-merge": applied(2, 3, 5, op="Reshape", operands=(np.array([6, 5]),)),
    "reshape-split": applied(30, 7, op="Reshape", operands=(np.array([2, 3, 5, 7]),)),
    "reshape-across-axes": applied(6, 35, op="Reshape", operands=(np.array([10, 21]),)),
    "reshape-with-ones": applied(2, 1, 15, op="Reshape", operands=(np.array([1, 2, 3, 1, 5]),)),
    "reshape-minus-one": applied(2, 3, 5, op="Reshape", operands=(np.array([-1, 2]),)),
    "reshape-zero-keeps": applied(2, 3, 5, op="Reshape", operands=(np.array([0, -1]),)),
    "reshape-to-scalar": applied(1, 1, op="Reshape", operands=(np.array([], np.int64),)),
    "flatten": applied(2, 3, 5, 7, op="Flatten", axis=2),
    "flatten-axis-0": applied(2, 3, op="Flatten", axis=0),
    "flatten-negative-axis": applied(2, 3, 5, op="Flatten", axis=-1),
    "squeeze-all": applied(1, 2, 1, 3, op="Squeeze"),
    "squeeze-negative-axis": applied(2, 1, 3, 1, op="Squeeze", operands=(np.array([-1]),)),
    "unsqueeze-two": applied(2, 3, op="Unsqueeze", operands=(np.array([0, -1]),)),
    # Transpose.
    "transpose": applied(2, 3, 5, 7, op="Transpose", perm=[2, 0, 3, 1]),
    "transpose-default-reverses": applied(2, 3, 5, op="Transpose"),
    # Slice.
    "slice": slice_(5, 7, starts=[1, 2], ends=[4, 6], axes=[0, 1]),
    "slice-axes-missing": slice_(5, 7, starts=[1, 2], ends=[4, 6], axes=None),
    "slice-negative-bounds-and-axis": slice_(5, 7, starts=[-3], ends=[-1], axes=[-1]),
    "slice-bounds-clamped": slice_(5, 7, starts=[-100, 3], ends=[3, 100], axes=[0, 1]),
    "slice-step": slice_(5, 7, starts=[1], ends=[INT64_MAX], axes=[1], steps=[3]),
    "slice-negative-step": slice_(5, 7, starts=[-1], ends=[INT64_MIN], axes=[1], steps=[-1]),
    "slice-negative-step-from-beyond": slice_(5, 7, starts=[100], ends=[1], axes=[1], steps=[-2]),
    "slice-whole-axis-reversed-with-forward": slice_(5, 7, starts=[4, 0], ends=[-100, 7], axes=[0, 1], steps=[-1, 1]),
    # Split.
    "split-uneven-last": applied(2, 10, op="Split", operands=(np.array([2, 5, 3]),), outputs=3, pick=2, axis=1),
    "split-even-middle": applied(6, 5, op="Split", operands=(np.array([2, 2, 2]),), outputs=3, pick=1),
    "split-without-sizes-uneven": applied(2, 7, op="Split", outputs=3, pick=2, axis=1, num_outputs=3),
    "split-negative-axis": applied(2, 5, op="Split", operands=(np.array([1, 4]),), outputs=2, pick=1, axis=-1),
    # Concat.
    "concat-of-one": applied(2, 3, op="Concat", axis=0),
    "concat-of-itself": applied(2, 3, op="Concat", operands=("value", "value"), axis=1),
    "concat-with-numbers": applied(
        2, 3, op="Concat", operands=(np.full((1, 3), -7), "value", np.full((3, 3), 9)), axis=0
    ),
    "concat-negative-axis": applied(2, 3, op="Concat", operands=("value", np.zeros((2, 2), np.int64)), axis=-1),
    "concat-with-an-empty-tensor": applied(2, 3, op="Concat", operands=(np.zeros((2, 0), np.int64), "value"), axis=1),
    # Pad.
    "pad": pad(3, 5, pads=[1, 2, 3, 0], number=-7),
    "pad-zero-by-default": pad(3, 5, pads=[0, 1, 0, 1]),
    "pad-negative": pad(5, 7, pads=[-1, -2, -2, 0]),
    "pad-here-crop-there": pad(5, 7, pads=[2, -3, -2, 3], number=-7),
    "pad-axes": pad(3, 5, 7, pads=[1, 2, 0, 3], axes=[-1, 0]),
    "pad-edge": pad(3, 5, pads=[2, 1, 0, 3], mode="edge"),
    "pad-reflect": pad(3, 5, pads=[2, 1, 1, 4], mode="reflect"),
    "pad-reflect-extent-of-two": pad(2, 5, pads=[1, 0, 1, 0], mode="reflect"),
    "pad-wrap": pad(3, 5, pads=[3, 1, 2, 4], mode="wrap"),
    "pad-nothing": pad(3, 5, pads=[0, 0, 0, 0]),
    # Repetition.
    "expand": applied(3, 1, 5, op="Expand", operands=(np.array([2, 3, 7, 5]),)),
    "expand-to-smaller-target": applied(3, 5, op="Expand", operands=(np.array([1]),)),
    "tile": applied(2, 3, op="Tile", operands=(np.array([1, 4]),)),
    "tile-all": applied(2, 3, 5, op="Tile", operands=(np.array([3, 2, 2]),)),
    # Gather.
    "gather": applied(2, 5, 3, op="Gather", operands=(np.array([4, 0, 0, 2]),), axis=1),
    "gather-negative-index": applied(2, 5, op="Gather", operands=(np.array([-1, -5, 1]),), axis=-1),
    "gather-scalar-index": applied(2, 5, 3, op="Gather", operands=(np.array(-2),), axis=1),
    "gather-table": applied(2, 5, 3, op="Gather", operands=(np.array([[0, 4, -1], [1, 1, 3]]),), axis=1),
    "gather-first-axis": applied(5, 3, op="Gather", operands=(np.array([[3], [1]]),)),
    "gather-nd": applied(3, 5, 7, op="GatherND", operands=(np.array([[0, 4], [2, -1], [-3, 0]]),)),
    "gather-nd-one-element": applied(3, 5, op="GatherND", operands=(np.array([[2, 3]]),)),
    "gather-nd-one-row": applied(3, 5, op="GatherND", operands=(np.array([2]),)),
    "gather-nd-table": applied(3, 5, op="GatherND", operands=(np.array([[[0], [2]], [[-1], [1]]]),)),
    "gather-elements": applied(2, 3, op="GatherElements", operands=(np.array([[0, -1], [2, 1]]),), axis=1),
    "gather-elements-smaller-table": applied(3, 5, op="GatherElements", operands=(np.array([[2, 0, -1]]),), axis=0),
    # Blocks.
    "space-to-depth": applied(2, 3, 4, 6, op="SpaceToDepth", blocksize=2),
    "depth-to-space-dcr": applied(2, 12, 3, 5, op="DepthToSpace", blocksize=2, mode="DCR"),
    "depth-to-space-crd": applied(2, 18, 1, 5, op="DepthToSpace", blocksize=3, mode="CRD"),
    "depth-to-space-default": applied(1, 8, 3, 2, op="DepthToSpace", blocksize=2),
    # Blocks side by side, put back.
    "col2im-apart": col2im(2, 3, 6, image=(6, 4), block=(2, 2), strides=[2, 2]),
    "col2im-gaps-and-an-edge": col2im(1, 5, 9, image=(8, 9), block=(2, 1), strides=[3, 4]),
    "col2im-cropped": col2im(2, 2, 6, image=(4, 5), block=(3, 2), strides=[3, 2], pads=[1, 0, 1, 1]),
    "col2im-interleaved": col2im(1, 2, 4, image=(4, 4), block=(2, 2), dilations=[2, 2]),
    "col2im-one-axis": col2im(2, 3, 5, image=(11,), block=(2,), strides=[2]),
    # Where with a constant condition.
    "where-number": applied(2, 3, op="Where", operands=(np.array([True, False, True]), "value", np.array(-7))),
    "where-number-first": applied(2, 3, op="Where", operands=(np.array([[True], [False]]), np.array([-7]), "value")),
    "where-both-from-the-input": applied(3, 3, op="Where", operands=(np.eye(3, dtype=bool), "value", "value")),
    "where-always": applied(2, 3, op="Where", operands=(np.array(True), "value", np.array(0))),
    # Convolutions that only move.
    "conv-one-hot": conv(3, 5, 7, TAPS[:3], pads=[1, 1, 1, 1]),
    "conv-one-hot-without-padding": conv(3, 5, 7, TAPS[:3]),
    "conv-one-hot-two-filters-per-channel": conv(3, 5, 7, TAPS, pads=[1, 1, 1, 1]),
    "conv-one-hot-dilated-strided-padded-unevenly": conv(
        2, 9, 11, TAPS[:4], pads=[2, 0, 1, 3], strides=[2, 3], dilations=[2, 1]
    ),
    "conv-one-hot-zero-bias": applied(
        2, 3, 5, 7, op="Conv", operands=(TAPS[:3], np.zeros(3, np.int64)), group=3, pads=[1, 1, 1, 1]
    ),
    "conv-one-hot-same-upper": conv(2, 5, 7, one_hot((0, 1), (1, 0), kernel=(2, 2)), auto_pad="SAME_UPPER"),
    "conv-one-hot-same-lower": conv(2, 6, 7, one_hot((0, 1), (3, 0), kernel=(4, 2)), auto_pad="SAME_LOWER"),
    "conv-one-hot-same-strided": conv(2, 5, 7, TAPS[:2], auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv-one-hot-valid": conv(2, 5, 7, TAPS[:2], auto_pad="VALID", dilations=[2, 1]),
    "conv-patches": conv_patches(2, 5, 7, PATCHES),
    "conv-patches-reordered": conv_patches(2, 5, 7, PATCHES[::-1], pads=[0, 1, 1, 0], strides=[1, 2]),
    "conv-one-hot-even-kernel": conv(2, 5, 7, one_hot((0, 1), (1, 0), kernel=(2, 2)), pads=[0, 0, 1, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_rule_reads_what_the_operator_reads(case: str) -> None:
    CASES[case]().assert_map_is_exact()


def test_every_rule_has_a_case() -> None:
    tried = set()
    for build in CASES.values():
        producer = build().value.producer
        assert producer is not None
        tried.add(producer.op)
    assert tried == set(RULES)


# Operators that look like movement and are not, or whose operands are not known: the rule says None.
NOT_MOVEMENT: dict[str, Callable[[], Chain]] = {
    "conv-two-taps": conv(2, 5, 7, TAPS[:2] + TAPS[2:4], pads=[1, 1, 1, 1]),
    "conv-weight-two": conv(2, 5, 7, 2 * TAPS[:2], pads=[1, 1, 1, 1]),
    "conv-no-tap": conv(2, 5, 7, 0 * TAPS[:2], pads=[1, 1, 1, 1]),
    "conv-biased": applied(2, 2, 5, 7, op="Conv", operands=(TAPS[:2], np.array([0, 1])), group=2),
    "conv-not-depthwise": applied(2, 2, 5, 7, op="Conv", operands=(one_hot((0, 0), kernel=(1, 1)).repeat(2, 1),)),
    "conv-patches-two-taps": conv_patches(2, 5, 7, PATCHES + PATCHES[::-1]),
    "conv-some-patches": conv_patches(2, 5, 7, PATCHES[:5]),
    "where-several-numbers": applied(2, 3, op="Where", operands=(np.array([True, False, True]), "value", np.arange(3))),
    "col2im-overlapping": col2im(1, 2, 12, image=(4, 5), block=(2, 2)),
    "col2im-overlapping-along-one-axis": col2im(1, 2, 6, image=(4, 4), block=(2, 2), strides=[2, 1]),
    "gather-nd-per-batch": applied(2, 3, 5, op="GatherND", operands=(np.array([[1], [0]]),), batch_dims=1),
    "neg": applied(2, 3, op="Neg"),
}


@pytest.mark.parametrize("case", NOT_MOVEMENT)
def test_an_operator_that_computes_ends_the_walk(case: str) -> None:
    chain = NOT_MOVEMENT[case]()
    (only,) = provenances(chain.value, identity(chain.shape), chain.positions)
    assert only.value is chain.value
