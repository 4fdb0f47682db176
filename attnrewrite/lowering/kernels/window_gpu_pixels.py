"""Which pixel, region and validity the tokens of a window have, as index arithmetic of a GPU kernel.

The closed form of `WindowGeometry.pixels`, `key_pixels` and `regions`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.gpu_builder import Expr, every, unflatten

Pixel = tuple[list[Expr], Expr | bool]
"""Coordinates on a feature map, and whether they lie on it; where they do not, the coordinates mean nothing."""


class Window:
    """One window of the grid, seen by one head."""

    def __init__(self, spec: FlashWindowAttention, window: Expr, head: Expr) -> None:
        self.spec, self.geometry, self.head = spec, spec.geometry, head
        self.axes = unflatten(window, spec.geometry.grid)

    def query_pixel(self, token: Expr) -> Pixel:
        """Where a token of the query window is written, and read from unless all windows share their queries."""
        return self._rolled(self._positions(token))

    def query_source(self, token: Expr) -> Pixel:
        """Where a query is read from."""
        if self.spec.shared_query:
            return unflatten(token, self.geometry.window_size), True
        return self.query_pixel(token)

    def key_pixel(self, token: Expr) -> Pixel:
        """Where key and value of a token are read from."""
        keys = self.geometry.keys
        if keys is None:
            return self.query_pixel(token)
        pixel, inside = [], []
        along = unflatten(token, keys.window_size)
        for axis, (extent, _, stride, offset, dilation) in enumerate(keys.axes()):
            rolled, _ = self.geometry.key_roll(axis)
            position = self.axes[axis] * stride + along[axis] * dilation + offset
            match keys.border:
                case "edge":
                    position = tirx.max(tirx.min(position, rolled - 1), 0)
                case "wrap":
                    position = tirx.floormod(position, rolled)
                case "reflect":
                    period = max(2 * (rolled - 1), 1)
                    folded = tirx.floormod(position, period)
                    position = tirx.min(folded, period - folded) if rolled > 1 else folded
                case _:
                    inside.append(tirx.all(position >= 0, position < rolled))
            moved = self._moved(position, self._shift(axis, of_keys=True), rolled)
            pixel.append(moved)
            if rolled != extent:
                inside.append(moved < extent)
        return pixel, every(inside)

    def region(self, token: Expr) -> Expr:
        """int32 label of the token's region, as `WindowGeometry.regions` numbers them."""
        label: Expr = tirx.const(0, "int32")
        for axis, position in enumerate(self._positions(token)):
            shift, padded = self._shift(axis), self.geometry.padded_size[axis]
            if not _is_zero(shift):
                label = label * 2 + tirx.Select(position < padded - shift, 0, 1)
        return label

    def crosses_regions(self) -> Expr:
        """Whether tokens of this window lie in different regions."""
        cuts = []
        for axis, size in enumerate(self.geometry.window_size):
            shift, padded = self._shift(axis), self.geometry.padded_size[axis]
            if not _is_zero(shift):
                first = self.axes[axis] * size
                cuts.append(tirx.all(first < padded - shift, first + size > padded - shift))
        return tirx.any(*cuts) if len(cuts) > 1 else cuts[0]

    def _positions(self, token: Expr) -> list[Expr]:
        """Position of a token on the shifted, padded map, per axis."""
        size = self.geometry.window_size
        return [w * s + t for w, s, t in zip(self.axes, size, unflatten(token, size), strict=True)]

    def _rolled(self, positions: Sequence[Expr]) -> Pixel:
        geometry = self.geometry
        pixel, inside = [], []
        for axis, position in enumerate(positions):
            extent, padded = geometry.feature_size[axis], geometry.padded_size[axis]
            around = padded if geometry.shift_padded else extent
            moved = self._moved(position, self._shift(axis), around)
            pixel.append(moved)
            if padded != extent:
                inside.append(moved < extent if geometry.shift_padded else position < extent)
        return pixel, every(inside)

    def _moved(self, position: Expr, shift: Expr | int, around: int) -> Expr:
        """(position + shift) mod around; positions from `around` on come out past the map."""
        shift = shift % around  # a window that is larger than the map may be shifted by more than that
        if _is_zero(shift):
            return position
        moved = position + shift
        return tirx.Select(moved < around, moved, moved - around)

    def _shift(self, axis: int, of_keys: bool = False) -> Expr | int:
        """The shift of this head: a number, or an expression where groups of heads have their own."""
        runs = self.spec.runs_of_heads()
        shifts = [own.key_roll(axis)[1] if of_keys else own.shift_size[axis] for _, own in runs]
        if len(set(shifts)) == 1:
            return shifts[0]
        result: Expr = tirx.const(shifts[-1], "int32")
        for position in reversed(range(len(runs) - 1)):
            first_of_next = sum(count for count, _ in runs[: position + 1])
            result = tirx.Select(self.head < first_of_next, shifts[position], result)
        return result


def _is_zero(shift: Expr | int) -> bool:
    return isinstance(shift, int) and shift == 0
