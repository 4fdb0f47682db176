"""Symbolic extents: exact, or NonAffine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnrewrite.dims import Dim, NonAffine, equal, is_static, product, proportion, symbols

B, S = Dim((("B", 1),)), Dim((("S", 1),))

EXACT: dict[str, tuple[object, object]] = {
    "add": (B + 3 + B, Dim((("B", 2),), 3)),
    "add-from-the-left": (3 + B, B + 3),
    "two-symbols": (S + B, B + S),
    "cancels": (B - B, 0),
    "difference": (7 - B, B * -1 + 7),
    "negated": (-(B * 2 + 1), Dim((("B", -2),), -1)),
    "product": (3 * (B * 2 + 1), B * 6 + 3),
    "times-zero": (B * 0, 0),
    "floor": ((B * 6 + 4) // 2, B * 3 + 2),
    "floor-of-the-constant": ((B * 6 + 5) // 2, B * 3 + 2),
    "even": ((B * 6 + 4) / 2, B * 3 + 2),
    "ratio": ((B * 6) // (B * 2), 3),
    "remainder": ((B * 6 + 5) % 3, 2),
    "remainder-of-a-multiple": ((B * 6) % (B * 2), 0),
    "whole-float": (B * 2.0, B * 2),
    "elements": (product((B, 3, 5)), B * 15),
}


@pytest.mark.parametrize("case", EXACT)
def test_arithmetic(case: str) -> None:
    found, expected = EXACT[case]
    assert found == expected


NON_AFFINE: dict[str, Callable[[], object]] = {
    "product-of-symbols": lambda: B * S,
    "elements-of-two-symbols": lambda: product((B, S)),
    "uneven-floor": lambda: B // 2,
    "uneven-quotient": lambda: (B * 2 + 1) / 2,
    "number-by-symbol": lambda: 12 // B,
    "other-ratio": lambda: (B * 2 + 1) // B,
    "remainder": lambda: B % 2,
    "by-zero": lambda: (B * 2) // 0,
    "remainder-by-zero": lambda: (B * 2) % 0,
    "half": lambda: B * 0.5,
    "plus-a-half": lambda: B + 0.5,
    "by-a-half": lambda: B // 0.5,
}


@pytest.mark.parametrize("case", NON_AFFINE)
def test_what_leaves_the_affine_expressions_is_refused(case: str) -> None:
    with pytest.raises(NonAffine):
        NON_AFFINE[case]()


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [(B, B, True), (B + 1, B, False), (B, -1, False), (B + 1, 0, False), (3, 3, True), (B + S + 2, 1, False)],
)
def test_equality_for_every_value_of_the_symbols(a: Dim, b: Dim, same: bool) -> None:
    assert equal(a, b) is same


@pytest.mark.parametrize(("a", "b"), [(B, 1), (B, 0), (B * 2, S), (B - S, 1)])
def test_equality_that_depends_on_the_symbols_is_refused(a: Dim, b: Dim) -> None:
    with pytest.raises(NonAffine):
        equal(a, b)


def test_text_and_questions() -> None:
    assert [str(d) for d in (B, B * 64, B + S * 2 - 3)] == ["B", "64*B", "B+2*S-3"]
    assert symbols(B + S) == ("B", "S")
    assert symbols(5) == symbols(None) == ()
    assert not is_static((B, 2))
    assert not is_static(None)
    assert is_static((1, 2))
    assert proportion(B * 6, B * 4) is None
