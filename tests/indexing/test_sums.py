"""Sums of moved numbers against the operators themselves, run on an iota."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from attnrewrite.graph import Value
from attnrewrite.indexing.map import IndexingError, identity
from attnrewrite.indexing.sums import summands
from tests.indexing.oracle import Chain


def blocks(image: list[int], block: list[int], count: int, **attributes: object) -> Chain:
    """Two channels of `count` blocks, added up."""
    chain = Chain(2, 2 * int(np.prod(block)), count)
    chain.op("Col2Im", np.array(image), np.array(block), **attributes)
    return chain


def padded_and_added() -> Chain:
    """Two slices, grown by a pixel on either side: out[i] = x[0, i] + x[1, i - 1]."""
    chain = Chain(2, 5)
    x = chain.source
    cut = [chain.node("Slice", [x, *(_ints(v) for v in ([k], [k + 1], [0]))]) for k in range(2)]
    grown = [chain.node("Pad", [c, _ints(p)]) for c, p in zip(cut, ([0, 0, 0, 1], [0, 1, 0, 0]), strict=True)]
    chain.node("Add", grown)
    chain.op("Transpose", perm=[1, 0])
    return chain


def _ints(values: list[int]) -> Value:
    array = np.array(values)
    return Value(f"c{values}", array.shape, array.dtype, array)


CASES: dict[str, Callable[[], Chain]] = {
    "overlapping": lambda: blocks([4, 5], [3, 2], 8),
    "padded": lambda: blocks([4, 5], [3, 3], 20, pads=[1, 1, 1, 1]),
    "padded-unevenly-strided": lambda: blocks([5, 6], [3, 3], 6, pads=[1, 0, 0, 2], strides=[2, 2]),
    "dilated": lambda: blocks([5, 6], [2, 3], 8, dilations=[1, 2]),
    "one-axis": lambda: blocks([7], [3], 3, strides=[2]),
    "three-axes": lambda: blocks([3, 4, 5], [2, 1, 3], 24),
    "padded-maps": padded_and_added,
}


@pytest.mark.parametrize("case", CASES)
def test_summands_add_up_to_what_the_operators_computed(case: str) -> None:
    chain = CASES[case]()
    elements, total = chain.arrays[chain.source], np.zeros(chain.shape, np.int64)
    for read in summands(chain.value, identity(chain.shape), lambda v: v is chain.source, chain.positions):
        part = elements[tuple(c.values for c in read.index)]
        total += part if read.where is None else np.where(read.where, part, 0)
    np.testing.assert_array_equal(total, chain.arrays[chain.value])


def test_a_number_added_beside_is_no_summand() -> None:
    chain = Chain(2, 3)
    chain.op("Add", np.array([1, 2, 3]))
    with pytest.raises(IndexingError, match="which comes from elsewhere"):
        summands(chain.value, identity(chain.shape), lambda v: v is chain.source, chain.positions)


def test_padding_other_than_zero_is_no_summand() -> None:
    chain = Chain(2, 3)
    chain.op("Pad", np.array([0, 1, 0, 1]), np.array(5))
    with pytest.raises(IndexingError, match="numbers other than zero"):
        summands(chain.value, identity(chain.shape), lambda v: v is chain.source, chain.positions)
