"""Symbolic extents: integers, or affine expressions of named dimensions such as `64*batch`.

An extent is a plain `int` whenever it is one; `Dim` stands for the rest. Arithmetic that leaves the affine expressions
(a product of two symbols, a division that is not exact) raises `NonAffine`, so an extent is exact or unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


class NonAffine(ArithmeticError):
    """The result is not an affine expression of the symbols."""


class SymbolicExtent(ValueError):
    """A plain number is asked for where the model has a symbol; the message names the extent."""


@dataclass(frozen=True)
class Dim:
    """sum(coefficient * symbol) + constant, with at least one symbol; symbols are non-negative integers."""

    terms: tuple[tuple[str, int], ...]
    constant: int = 0

    def __str__(self) -> str:
        parts = [symbol if c == 1 else f"{c}*{symbol}" for symbol, c in self.terms]
        return "+".join(parts + ([str(self.constant)] if self.constant else [])).replace("+-", "-")

    def __repr__(self) -> str:
        return str(self)

    def __add__(self, other: Extent) -> Extent:
        terms, constant = _parts(other)
        summed = dict(self.terms)
        for symbol, c in terms.items():
            summed[symbol] = summed.get(symbol, 0) + c
        return _make(summed, self.constant + constant)

    __radd__ = __add__

    def __neg__(self) -> Extent:
        return self * -1

    def __sub__(self, other: Extent) -> Extent:
        return self + other * -1

    def __rsub__(self, other: Extent) -> Extent:
        return -self + other

    def __mul__(self, other: Extent) -> Extent:
        if isinstance(other, Dim):
            raise NonAffine(f"{self} * {other}")
        factor = _integer(other)
        return _make({s: c * factor for s, c in self.terms}, self.constant * factor)

    __rmul__ = __mul__

    def __floordiv__(self, other: Extent) -> Extent:
        if isinstance(other, Dim):
            ratio = proportion(self, other)
            if ratio is None:
                raise NonAffine(f"{self} // {other}")
            return ratio
        divisor = _integer(other)
        if divisor == 0 or any(c % divisor for _, c in self.terms):
            raise NonAffine(f"{self} // {other}")
        return _make({s: c // divisor for s, c in self.terms}, self.constant // divisor)

    def __rfloordiv__(self, other: Extent) -> Extent:
        raise NonAffine(f"{other} // {self}")

    def __rmod__(self, other: Extent) -> Extent:
        raise NonAffine(f"{other} % {self}")

    def __truediv__(self, other: Extent) -> Extent:
        if (self % other) != 0:
            raise NonAffine(f"{self} / {other}")
        return self // other

    def __mod__(self, other: Extent) -> Extent:
        if isinstance(other, Dim):
            if proportion(self, other) is None:
                raise NonAffine(f"{self} % {other}")
            return 0
        divisor = _integer(other)
        if divisor == 0 or any(c % divisor for _, c in self.terms):
            raise NonAffine(f"{self} % {other}")
        return self.constant % divisor


Extent = int | Dim
Shape = tuple[Extent, ...]


def proportion(numerator: Dim, denominator: Dim) -> int | None:
    """The integer r with numerator == r * denominator for every value of the symbols, or None."""
    symbol, coefficient = denominator.terms[0]
    ratio, rest = divmod(dict(numerator.terms).get(symbol, 0), coefficient)
    return ratio if rest == 0 and denominator * ratio == numerator else None


def equal(a: Extent, b: Extent) -> bool:
    """Whether two extents are the same number for every value of the symbols; NonAffine where that depends on them."""
    difference = a - b
    if not isinstance(difference, Dim):
        return difference == 0
    signs = {c > 0 for _, c in difference.terms}
    if len(signs) == 1 and difference.constant and (difference.constant > 0) in signs:
        return False  # symbols are not negative: the difference is never zero
    raise NonAffine(f"{a} == {b}")


def symbols(extent: Extent | None) -> tuple[str, ...]:
    return tuple(s for s, _ in extent.terms) if isinstance(extent, Dim) else ()


def product(extents: Shape) -> Extent:
    """The number of elements of a shape; NonAffine where two symbols meet."""
    result: Extent = 1
    for extent in extents:
        result = result * extent
    return result


def static(extent: Extent) -> int:
    """An extent that is known to be a plain number; SymbolicExtent if it is not."""
    if isinstance(extent, Dim):
        raise SymbolicExtent(f"the extent {extent} is symbolic")
    return extent


def elements(shape: Shape) -> int:
    """The number of elements of a static shape."""
    return math.prod(static(e) for e in shape)


def is_static(shape: Shape | None) -> bool:
    return shape is not None and all(isinstance(e, int) for e in shape)


def _parts(value: Extent) -> tuple[dict[str, int], int]:
    return (dict(value.terms), value.constant) if isinstance(value, Dim) else ({}, _integer(value))


def _integer(number: int) -> int:
    """A number met in shape arithmetic, where floats pass through as well; NonAffine if it is no integer."""
    if int(number) != number:
        raise NonAffine(f"{number} is no integer")
    return int(number)


def _make(terms: dict[str, int], constant: int) -> Extent:
    kept = tuple(sorted((s, c) for s, c in terms.items() if c))
    return Dim(kept, constant) if kept else constant
