"""Cells of a map, read off the tokens that each pooled token reduces."""

from __future__ import annotations

import numpy as np
import pytest

from attnrewrite.localattention.pools import Cells, cells_of

MAP = np.arange(6 * 10).reshape(6, 10)


def blocks(rows: int, columns: int) -> np.ndarray:
    """int64 [cells, rows * columns]: the pixels of every cell of these sides, cells row-major."""
    split = MAP.reshape(6 // rows, rows, 10 // columns, columns).transpose(0, 2, 1, 3)
    return split.reshape(-1, rows * columns)


@pytest.mark.parametrize(
    ("table", "digits", "pooled"),
    [
        (blocks(2, 5), ((1, 5), (10, 2)), (3, 2)),
        (blocks(1, 2), ((1, 2),), (6, 5)),
        (blocks(3, 1), ((10, 3),), (2, 10)),
        (MAP.reshape(2, 30).T, ((30, 2),), (3, 10)),  # each pixel with the one three rows below
        (np.arange(60).reshape(3, 20), ((1, 20),), (3,)),  # two whole rows: no pool along the axes
    ],
    ids=["blocks", "columns", "rows", "far-apart", "across-axes"],
)
def test_cells_are_digits_of_the_position(
    table: np.ndarray, digits: tuple[tuple[int, int], ...], pooled: tuple[int, ...]
) -> None:
    shuffled = np.random.default_rng(0).permutation(table)  # the order of the cells means nothing
    for rows in (table, shuffled, table[:, ::-1]):
        cells = cells_of(rows, 60)
        assert cells == Cells(60, digits)
        assert cells.pooled((6, 10)) == pooled
        assert (cells.number(rows) == cells.number(rows[:, :1])).all()
    assert np.array_equal(Cells(60, digits).number(table)[:, 0], np.arange(len(table)))


@pytest.mark.parametrize(
    "table",
    [
        np.stack([MAP[0, :3], MAP[0, 2:5]]),  # cells that overlap
        np.roll(blocks(2, 2), 1, axis=1)[:-1],  # one cell is missing
        np.roll(MAP, 1, axis=1).reshape(6, 5, 2).reshape(-1, 2),  # cut by a shift: one cell wraps around
        np.concatenate([blocks(2, 2)[:-1], [[0, 1, 10, 11]]]),  # one cell twice
        MAP.reshape(-1, 3)[:, [0, 2]],  # pixels that no cell holds
        blocks(2, 2)[:, [0, 0, 2, 3]],  # the first pixel of a cell twice
    ],
    ids=["overlapping", "one-missing", "shifted", "one-twice", "holes", "pixel-twice"],
)
def test_other_tables_are_no_cells(table: np.ndarray) -> None:
    assert cells_of(table, 60) is None
