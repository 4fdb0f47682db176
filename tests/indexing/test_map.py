"""The map itself: symbolic batches, what cannot be expressed and why, comparison with a counterexample."""

from __future__ import annotations

import numpy as np
import pytest

from attnrewrite.dims import Dim, Shape
from attnrewrite.graph import Node, Value
from attnrewrite.indexing.map import (
    Coordinate,
    Difference,
    IndexingError,
    axis_groups,
    first_difference,
    identity,
    reduced_where,
    reshape,
)
from attnrewrite.indexing.rules import sources

B, S = Dim((("B", 1),)), Dim((("S", 1),))


def at(shape: Shape, batch: int) -> tuple[int, ...]:
    """The shape at a batch size."""
    return tuple(e if isinstance(e, int) else dict(e.terms)["B"] * batch for e in shape)


# (what the tensor is reshaped to, what it was): windows leave a symbolic batch in front, or merged into it.
SYMBOLIC_RESHAPES: dict[str, tuple[Shape, Shape]] = {
    "same": ((B, 6, 5), (B, 6, 5)),
    "split-behind-the-batch": ((B, 2, 3, 5), (B, 6, 5)),
    "merge-behind-the-batch": ((B, 30), (B, 6, 5)),
    "windows-into-the-batch": ((B * 6, 5), (B, 6, 5)),
    "windows-out-of-the-batch": ((B, 2, 3, 5), (B * 6, 5)),
    "regrouped-batch": ((B * 3, 10), (B * 6, 5)),
    "ones-around": ((1, B, 1, 30), (B, 1, 6, 5)),
    "batch-behind-a-one": ((1, B * 6, 5), (1, B, 6, 5)),
}


@pytest.mark.parametrize("case", SYMBOLIC_RESHAPES)
def test_reshape_with_a_symbolic_batch(case: str) -> None:
    """Element b of the batch enumerates as many rows as lie within it; its coordinates move on by `batch` each time."""
    out, into = SYMBOLIC_RESHAPES[case]
    index = reshape(identity(out), out, into)
    for batch in (1, 2, 5):
        elements = np.arange(np.prod(at(into, batch))).reshape(at(into, batch))
        expected = elements.reshape(at(out, batch))
        axis = next(a for a, e in enumerate(out) if isinstance(e, Dim))
        for element in range(batch):
            rows = at(out, 1)[axis]
            found = elements[tuple(c.values + c.batch * element for c in index)]
            np.testing.assert_array_equal(
                np.broadcast_to(found, at(out, 1)), expected.take(range(element * rows, (element + 1) * rows), axis)
            )


INEXPRESSIBLE: dict[str, tuple[Shape, Shape, str]] = {
    "other-size": ((2, 5), (3, 3), r"reshape from \(3, 3\) to \(2, 5\) does not keep the number of elements"),
    "batch-merged-behind": ((B * 3,), (3, B), "the symbolic extent B is split off behind another axis"),
    "batch-split-unevenly": ((4, B), (B * 4,), "the symbolic extent B is merged behind another axis"),
    "batch-split-inside": ((3, B * 4), (B * 6, 2), r"the symbolic extent 4\*B is merged behind another axis"),
    "two-symbols": ((B, S), (S, B), r"reshape from \(S, B\) to \(B, S\) multiplies two symbolic extents"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_a_reshape_that_has_no_map_says_why(case: str) -> None:
    out, into, sentence = INEXPRESSIBLE[case]
    with pytest.raises(IndexingError, match=f"^{sentence}$"):
        reshape(identity(out), out, into)


def test_an_axis_that_is_no_multiple_of_one_symbol_has_no_coordinate() -> None:
    with pytest.raises(IndexingError, match=r"^an axis of extent B\+1 is not a multiple of one symbol$"):
        identity((B + 1, 3))


# One node on an input of this shape, and why it has no map.
SYMBOLIC_NODES: dict[str, tuple[str, Shape, Shape, list[object], dict[str, object], str]] = {
    "slice": ("Slice", (B, 3), (B - 1, 3), [[1], [100], [0]], {}, "an axis of extent B-1 is not"),
    "roll": ("Slice", (B, 3), (B, 3), [[-1], [-100], [0], [-1]], {}, "a slice along an axis of symbolic extent B"),
    "concat": ("Concat", (B, 3), (B * 2, 3), [], {"axis": 0}, "a concatenation depends on the symbolic batch"),
    "pad": ("Pad", (B, 3), (B, 3), [[1, 0, -1, 0]], {}, "padding along an axis of symbolic extent B"),
    "gather": ("Gather", (B, 3), (2, 3), [[0, -1]], {"axis": 0}, "a gather along an axis of symbolic extent B"),
    "repeat": ("Tile", (B, 3), (B * 2, 3), [[2, 1]], {}, "a repetition depends on the symbolic batch"),
    "space-to-depth": (
        "SpaceToDepth",
        (2, 3, B * 2, 4),
        (2, 12, B, 2),
        [],
        {"blocksize": 2},
        "space to depth depends on the symbolic batch",
    ),
    "depth-to-space": (
        "DepthToSpace",
        (2, 12, B, 2),
        (2, 3, B * 2, 4),
        [],
        {"blocksize": 2},
        "depth to space depends on the symbolic batch",
    ),
}


@pytest.mark.parametrize("case", SYMBOLIC_NODES)
def test_moving_along_a_symbolic_axis_has_no_map(case: str) -> None:
    op, into, out, operands, attributes, sentence = SYMBOLIC_NODES[case]
    data = Value("x", into, np.dtype(np.int64))
    constants = [Value(f"c{k}", np.shape(c), np.dtype(np.int64), np.asarray(c)) for k, c in enumerate(operands)]  # type: ignore[arg-type]
    output = Value("y", out, np.dtype(np.int64))
    node = Node(op, [data, data] if op == "Concat" else [data, *constants], [output], attributes)
    with pytest.raises(IndexingError, match=f"^{sentence}"):
        sources(node, output, identity(out))


def test_a_symbolic_axis_may_be_sliced_whole() -> None:
    data, output = Value("x", (B, 3), np.dtype(np.int64)), Value("y", (B, 2), np.dtype(np.int64))
    bounds = [Value(n, (2,), np.dtype(np.int64), np.array(c)) for n, c in (("s", [0, 1]), ("e", [2**31 - 1, 3]))]
    found = sources(Node("Slice", [data, *bounds], [output]), output, identity((B, 2)))
    assert found is not None
    (read,) = found
    assert [(c.batch, c.values.reshape(-1).tolist()) for c in read.index] == [(1, [0]), (0, [1, 2])]  # type: ignore[union-attr]


def test_axis_groups_mix_only_what_must_be() -> None:
    groups = axis_groups((2, 3, 5, 7, 4), (6, 5, 28))
    assert [(list(o), list(i)) for o, i in groups] == [([0, 1], [0]), ([2], [1]), ([3, 4], [2])]


def test_independence_of_an_axis_is_read_off_the_coordinate() -> None:
    row, column = reshape(identity((6, 5)), (6, 5), (6, 5))
    assert row.depends_on() == {0}
    assert column.depends_on() == {1}
    outer, inner, last = reshape(identity((6, 5)), (6, 5), (2, 3, 5))
    assert (outer.depends_on(), inner.depends_on(), last.depends_on()) == ({0}, {0}, {1})


def test_first_difference_is_the_first_and_says_both_numbers() -> None:
    found = np.arange(12).reshape(3, 4)
    expected = found.copy()
    expected[2, 1] = -1
    assert first_difference(found, expected) == Difference((2, 1), 9, -1)
    assert first_difference(found, found) is None
    assert first_difference(np.zeros((3, 1)), np.zeros((1, 4))) is None


def test_coordinates_are_equal_where_their_values_and_batch_strides_are() -> None:
    one = Coordinate(np.zeros((1, 3), np.int64))
    assert one.equals(Coordinate(np.zeros((2, 1), np.int64)))
    assert not one.equals(Coordinate(np.zeros((1, 3), np.int64), batch=1))
    assert not one.equals(Coordinate(np.ones((1, 3), np.int64)))


def test_merged_axes_cost_their_sum_not_their_product() -> None:
    (merged,) = reshape(identity((64, 48, 96)), (64, 48, 96), (64 * 48 * 96,))
    assert sum(part.size for part in merged.parts) <= 64 + 48 + 96 + 1
    assert merged.shape == (64, 48, 96)
    np.testing.assert_array_equal(merged.values.reshape(-1), np.arange(64 * 48 * 96))


@pytest.mark.parametrize("shape", [(8, 8, 12, 384), (4, 2, 8, 4608), (32, 96, 96), (9, 32768)])
def test_merged_axes_are_split_exactly(shape: tuple[int, ...]) -> None:
    """Also where a remainder carries over into the next axis (9 x 32768)."""
    (merged,) = reshape(identity((64, 48, 96)), (64, 48, 96), (64 * 48 * 96,))
    back = reshape((merged,), (64 * 48 * 96,), shape)
    for found, expected in zip(back, np.unravel_index(merged.values, shape), strict=True):
        np.testing.assert_array_equal(np.broadcast_to(found.values, expected.shape), expected)


def test_parts_that_vary_along_one_axis_are_added_up() -> None:
    one, two = np.arange(6).reshape(6, 1), np.arange(12).reshape(6, 2)
    coordinate = Coordinate.total([one, np.full((1, 1), 5), two])
    np.testing.assert_array_equal(coordinate.values, one + 5 + two)
    assert len(coordinate.parts) == 1
    assert Coordinate.total([one, 5 - one]).depends_on() == frozenset()


def test_values_vary_only_along_the_axes_that_tell_them_apart_where_they_count() -> None:
    """Of values [3, 4] that are the row wherever they count and anything elsewhere, the rows remain."""
    where = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    values = np.where(where, np.array([[5], [7], [9]]), np.arange(12).reshape(3, 4))
    rows = reduced_where(values, where)
    assert rows.shape == (3, 1)
    np.testing.assert_array_equal(np.where(where, rows, 0), np.where(where, values, 0))
    values[1, 2] = 8
    np.testing.assert_array_equal(reduced_where(values, where), values)
    everywhere = np.ones((3, 2, 4), bool)
    assert reduced_where(np.arange(3).reshape(3, 1, 1), everywhere).shape == (3, 1, 1)


def test_a_reshape_is_passed_by_where_no_index_can_name_its_output() -> None:
    """A symbolic batch behind another axis: merged with it and split again, the tokens are where they were."""
    x = Value("x", (4, B * 6, 5), np.dtype(np.float32))
    flat, back = Value("flat", (B * 24, 5), x.dtype), Value("back", (4, B * 6, 1, 5), x.dtype)
    Node("Reshape", [x, Value("to", (2,), np.dtype(np.int64))], [flat], {}, "merge")
    split = Node("Reshape", [flat, Value("to", (4,), np.dtype(np.int64))], [back], {}, "split")
    (read,) = sources(split, back, identity(back.known_shape)) or ()
    assert read.value is x
    for found, wanted in zip(read.index, identity(back.known_shape)[:2], strict=False):
        np.testing.assert_array_equal(found.values, wanted.values)
        assert found.batch == wanted.batch
