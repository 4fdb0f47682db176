"""Any spelling is recognised, and nothing wrong is rewritten: fixed seeds, fewer than `make property` runs.

A failure names its seeds: `python -m tests.property spelling SEED` (or `near-miss SEED`) shows the case.
"""

from __future__ import annotations

import pytest

from tests.property import check
from tests.property.check import Result, check_near_miss, check_spelling


@pytest.mark.parametrize("block", range(4))
def test_random_spellings_are_recognised(block: int) -> None:
    results = [check_spelling(seed) for seed in range(block * 50, block * 50 + 50)]
    _nothing_wrong(results)
    missed = [(r.drawn.seed, r.reasons) for r in results if not r.rewritten]
    assert len(missed) <= len(results) // 100 + 1, missed


@pytest.mark.parametrize("block", range(4))
def test_random_near_misses_are_left_or_right(block: int) -> None:
    results = [r for seed in range(block * 80, block * 80 + 80) if (r := check_near_miss(seed)) is not None]
    _nothing_wrong(results)
    left = [r for r in results if not r.rewritten]
    assert len(left) > len(results) // 2  # most faults matter
    for result in results:
        predicted = {"source/outlook", "source/aggregation"} & set(result.drawn.parts)  # logits are an operand there
        if result.fault == "second-consumer" and not predicted:
            assert not result.rewritten, result.drawn.seed


def test_an_exception_is_a_wrong_case_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: object) -> None:
        raise ValueError("no such\naxis")

    monkeypatch.setattr(check, "optimize", fails)
    result = check_spelling(0)
    assert not result.rewritten
    assert result.wrong is not None
    assert result.wrong.startswith("ValueError at test_random_spellings.py:")
    assert result.wrong.endswith("no such axis")


def _nothing_wrong(results: list[Result]) -> None:
    wrong = [(r.drawn.seed, r.fault, r.wrong) for r in results if r.wrong]
    assert not wrong, wrong
