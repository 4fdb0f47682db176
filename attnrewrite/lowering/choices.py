"""Register tiles that were measured to be better than those of the cost model, by matrix product.

An empty table changes nothing. Importing this does not import TVM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# More sums than any CPU has registers for; what a damaged file may not exceed.
MAX_SUMS = 64


@dataclass(frozen=True)
class Product:
    """`batch` matrix products of [rows, depth] by [depth, columns].

    dtype: of the sums. packed: the weights are constant and laid out for the tile.
    """

    batch: int
    rows: int
    columns: int
    depth: int
    dtype: str
    packed: bool

    @property
    def flops(self) -> float:
        """A multiplication and an addition for each element of each step."""
        return 2.0 * self.batch * self.rows * self.columns * self.depth

    def __str__(self) -> str:
        batch = f"{self.batch} of " if self.batch != 1 else ""
        return f"{batch}{self.rows}x{self.depth} by {self.depth}x{self.columns}"

    @property
    def key(self) -> str:
        """Its name in a file; equal for equal products only."""
        kind = "packed" if self.packed else "plain"
        return f"{kind} {self.batch}x{self.rows}x{self.columns}x{self.depth} {self.dtype}"


@dataclass(frozen=True)
class Choice:
    """A register tile of `rows` times `vectors` vectors of columns.

    rows_outside: the outer of the two loops over tiles runs over rows; None: whichever the cost model takes.
    """

    rows: int
    vectors: int
    rows_outside: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> Choice:
        """Raises ValueError for what is no choice that could be compiled."""
        if not isinstance(document, dict) or document.keys() != {"rows", "vectors", "rows_outside"}:
            raise ValueError(f"not a tile: {document!r}")
        rows, vectors, rows_outside = document["rows"], document["vectors"], document["rows_outside"]
        sizes = all(type(size) is int and size >= 1 for size in (rows, vectors))
        if not sizes or rows * vectors > MAX_SUMS or rows_outside not in (None, True, False):
            raise ValueError(f"not a tile: {document!r}")
        return cls(rows, vectors, rows_outside)


@dataclass(frozen=True)
class Choices:
    """The table, by `Product.key`. `applied` collects the keys that were asked for and found."""

    tiles: Mapping[str, Choice] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)

    def of(self, product: Product | None) -> Choice | None:
        """What was measured to be best; None: what the cost model says. A product of unknown size has no entry."""
        if product is None or product.key not in self.tiles:
            return None
        self.applied.add(product.key)
        return self.tiles[product.key]
