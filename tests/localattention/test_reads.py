"""Tables of reads: equal rows held once, compared as if they were written out in full."""

from __future__ import annotations

import numpy as np
import pytest

from attnrewrite.localattention import reads
from attnrewrite.localattention.reads import Reads, Table

FLOAT = np.dtype(np.float32)


def full(table: Table) -> np.ndarray:
    return table.rows(np.arange(table.pixels))


def sample(seed: int = 0, pixels: int = 7, keys: int = 4, heads: int = 3) -> Reads:
    """Two rows of keys, three of terms; pixel p reads rows p % 2 and p % 3."""
    rng = np.random.default_rng(seed)
    key_rows = np.stack([rng.permutation(pixels)[:keys] for _ in range(2)])
    by_two, by_three = np.arange(pixels) % 2, np.arange(pixels) % 3
    return Reads(
        Table(key_rows, by_two), Table(key_rows + 100, by_two), Table(rng.standard_normal((heads, 3, keys)), by_three)
    )


def reordered(one: Reads, order: np.ndarray) -> Reads:
    """The same reads with the slots of every pixel in another order, written out in full."""
    own = np.arange(one.keys.pixels)
    keys, values, terms = (Table(full(t)[..., order], own) for t in (one.keys, one.values, one.terms))
    return Reads(keys, values, terms)


def test_a_sum_of_tables_is_the_sum_of_what_they_stand_for() -> None:
    one, other = sample(0).terms, Table(np.arange(8.0).reshape(1, 2, 4), np.array([1, 0, 0, 1, 1, 0, 1]))
    total = one + other
    np.testing.assert_array_equal(full(total), full(one) + full(other))
    assert total.values.shape[-2] <= 6


def test_compact_holds_equal_rows_once() -> None:
    values = np.array([[[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [9.0, 9.0]]])
    table = Table(values, np.array([0, 1, 2, 2, 1]))
    compact = table.compact()
    np.testing.assert_array_equal(full(compact), full(table))
    assert compact.values.shape == (1, 2, 2)


@pytest.mark.parametrize("chunk", [1, 30, 1 << 20])
def test_equal_sets_are_equal_whatever_the_order(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(reads, "CHUNK", chunk)
    assert sample().difference(sample(), FLOAT) is None
    assert sample().difference(reordered(sample(), np.array([2, 0, 3, 1])), FLOAT) is None


def test_the_order_of_one_table_alone_matters() -> None:
    one = sample()
    other = Reads(one.keys, one.values, reordered(one, np.array([1, 0, 2, 3])).terms)
    assert "the logits are offset" in str(one.difference(other, FLOAT))


@pytest.mark.parametrize("chunk", [1, 30, 1 << 20])
def test_differences_are_named(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(reads, "CHUNK", chunk)
    one = sample()
    keys = full(one.keys)
    keys[5, 2] = 6000
    moved = Table(keys, np.arange(7))
    sentence = one.difference(Reads(moved, one.values, one.terms), FLOAT)
    assert sentence is not None
    assert sentence.startswith("output pixel 5 reads key pixel")
    terms = full(one.terms)
    terms[2, 6, 3] += 1e-3
    sentence = one.difference(Reads(one.keys, one.values, Table(terms, np.arange(7))), FLOAT)
    assert sentence == "the logits are offset by up to 0.001 from the original's"
    short = Reads(*(Table(full(t)[..., :3], np.arange(7)) for t in (one.keys, one.values, one.terms)))
    assert one.difference(short, FLOAT) == "output pixel 0 attends 4 keys in the original, 3 in the replacement"


def test_a_key_that_is_excluded_is_none() -> None:
    """Three keys of four, the fourth excluded: the same as the three alone. A number that does not exclude stays."""
    one = sample()
    short = Reads(*(Table(full(t)[..., :3], np.arange(7)) for t in (one.keys, one.values, one.terms)))
    terms = full(one.terms)
    for number, same in ((-np.inf, True), (float(np.finfo(np.float32).min), True), (-100.0, False)):
        terms[..., 3] = number
        masked = Reads(one.keys, one.values, Table(terms.copy(), np.arange(7)))
        assert (masked.difference(short, FLOAT) is None) == same
    terms[0, :, 3] = 0.0  # one head attends it
    assert Reads(one.keys, one.values, Table(terms, np.arange(7))).difference(short, FLOAT) is not None


def test_a_row_of_the_lowest_number_is_not_one_of_infinities() -> None:
    one = sample()
    low = Table(np.full((1, 1, 4), float(np.finfo(np.float32).min)), np.zeros(7, np.int64))
    none = Table(np.full((1, 1, 4), -np.inf), np.zeros(7, np.int64))
    assert Reads(one.keys, one.values, low).difference(Reads(one.keys, one.values, none), FLOAT) is not None


def test_infinities_are_equal_to_themselves_alone() -> None:
    one = sample()
    terms = one.terms.values.copy()
    terms[:, 0, 1] = -np.inf
    excluded = Reads(one.keys, one.values, Table(terms, one.terms.row_of))
    assert excluded.difference(excluded, FLOAT) is None
    assert one.difference(excluded, FLOAT) is not None
    terms = np.where(np.isinf(terms), -1e30, terms)
    assert excluded.difference(Reads(one.keys, one.values, Table(terms, one.terms.row_of)), FLOAT) is not None
