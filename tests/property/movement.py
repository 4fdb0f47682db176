"""Ways to cut a map of any number of axes into windows and to put it together again.

A `Cut` says which positions of an axis form a window: neighbouring ones, or ones a grid step apart. Every partition is
`(g, x, cut, channels)`, `[B, *S, C] -> [B*nW, N, C]`, every merge the inverse; both list windows and tokens row-major.
Letters: B batch, S spatial extents, N tokens per window, nW windows, C channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from attnrewrite.localattention.geometry import Sizes, WindowGeometry, product_of_axes
from tests.models.onnx_builder import END, Builder
from tests.models.onnx_movement import Roll


@dataclass(frozen=True)
class Cut:
    """Windows over a map whose extents they divide; spread: their tokens lie a grid step apart (MaxViT's grid)."""

    size: Sizes
    window: Sizes
    spread: bool = False

    @property
    def grid(self) -> Sizes:
        return tuple(s // w for s, w in zip(self.size, self.window, strict=True))

    @property
    def tokens(self) -> int:
        return math.prod(self.window)

    def pixels(self) -> np.ndarray:
        """int64 [nW, N]."""
        tables = []
        for count, window in zip(self.grid, self.window, strict=True):
            n, i = np.arange(count)[:, None], np.arange(window)
            tables.append(i * count + n if self.spread else n * window + i)
        return product_of_axes(tables, self.size)

    def split(self) -> list[int]:
        """Every axis as two: the windows and their tokens, or the other way round."""
        pairs = zip(self.grid, self.window, strict=True)
        return [e for count, window in pairs for e in ((window, count) if self.spread else (count, window))]

    def along(self, axis: int, n: int) -> tuple[int, int, int]:
        """Start, end and step of window n along an axis."""
        count, window = self.grid[axis], self.window[axis]
        return (n, END, count) if self.spread else (n * window, (n + 1) * window, 1)

    def order(self) -> list[int]:
        """The axes of `split` (batch in front, channels behind): windows, then tokens."""
        rank = len(self.size)
        outer, inner = [1 + 2 * a for a in range(rank)], [2 + 2 * a for a in range(rank)]
        windows, tokens = (inner, outer) if self.spread else (outer, inner)
        return [0, *windows, *tokens, 2 * rank + 1]


Partition = Callable[[Builder, str, Cut, int], str]


def by_reshape(g: Builder, x: str, cut: Cut, channels: int) -> str:
    x = g.transpose(g.reshape(x, -1, *cut.split(), channels), *cut.order())
    return g.reshape(x, -1, cut.tokens, channels)


def merged_by_reshape(g: Builder, tokens: str, cut: Cut, channels: int) -> str:
    x = g.reshape(tokens, -1, *cut.grid, *cut.window, channels)
    return g.reshape(g.transpose(x, *np.argsort(cut.order()).tolist()), -1, *cut.size, channels)


def axis_by_axis(g: Builder, x: str, cut: Cut, channels: int) -> str:
    """The windows of one axis after the other are folded into the batch."""
    rank = len(cut.size)
    for axis in range(rank):
        pair = cut.split()[2 * axis : 2 * axis + 2]
        x = g.reshape(x, -1, *cut.window[:axis], *pair, *cut.size[axis + 1 :], channels)
        at = 1 + axis + (1 if cut.spread else 0)
        order = [0, at, *(a for a in range(1, rank + 3) if a != at)]
        x = g.reshape(g.transpose(x, *order), -1, *cut.window[: axis + 1], *cut.size[axis + 1 :], channels)
    return g.reshape(x, -1, cut.tokens, channels)


def merged_axis_by_axis(g: Builder, tokens: str, cut: Cut, channels: int) -> str:
    rank = len(cut.size)
    x = g.reshape(tokens, -1, *cut.window, channels)
    for axis in reversed(range(rank)):
        x = g.reshape(x, -1, cut.grid[axis], *cut.window[: axis + 1], *cut.size[axis + 1 :], channels)
        at = 1 + axis + (1 if cut.spread else 0)
        order = [0, at, *(a for a in range(1, rank + 3) if a != at)]
        x = g.transpose(x, *np.argsort(order).tolist())
        x = g.reshape(x, -1, *cut.window[:axis], cut.size[axis], *cut.size[axis + 1 :], channels)
    return x


def _places(cut: Cut) -> Iterator[Sizes]:
    return itertools.product(*map(range, cut.grid))


def by_slices(g: Builder, x: str, cut: Cut, channels: int) -> str:
    """Every window cut out, then all of them stacked."""
    windows = []
    for place in _places(cut):
        window = x
        for axis, n in enumerate(place):
            start, end, step = cut.along(axis, n)
            window = g.slice(window, start, end, 1 + axis, step)
        windows.append(g.unsqueeze(window, 1))
    return g.reshape(g.concat(windows, 1), -1, cut.tokens, channels)


def merged_by_concat(g: Builder, tokens: str, cut: Cut, channels: int) -> str:
    """Windows put side by side, the last axis first; those of a grid one token after the other."""
    rank = len(cut.size)
    x = g.reshape(tokens, -1, *cut.grid, *cut.window, channels)
    if cut.spread:  # the tokens of a grid are what lies side by side
        x = g.transpose(x, 0, *range(1 + rank, 1 + 2 * rank), *range(1, 1 + rank), 2 * rank + 1)
    counts = cut.window if cut.spread else cut.grid
    for axis in reversed(range(rank)):
        pieces = g.split(x, [1] * counts[axis], 1 + axis)
        x = g.concat([g.squeeze(piece, 1 + axis) for piece in pieces], 1 + axis + axis)
    return x


def by_token_slices(g: Builder, x: str, cut: Cut, channels: int) -> str:
    """Token i of all windows at once is a strided slice; the tokens are stacked."""
    other = Cut(cut.size, cut.grid, not cut.spread)  # its windows are this one's tokens
    rank = len(cut.size)
    tokens = []
    for place in _places(other):
        token = x
        for axis, n in enumerate(place):
            start, end, step = other.along(axis, n)
            token = g.slice(token, start, end, 1 + axis, step)
        tokens.append(g.unsqueeze(token, 1 + rank))
    return g.reshape(g.concat(tokens, 1 + rank), -1, cut.tokens, channels)


def by_axis_gathers(g: Builder, x: str, cut: Cut, channels: int) -> str:
    """Every axis gathered into (window, token): im2col with the window as kernel and stride."""
    rank = len(cut.size)
    for axis, (extent, window) in enumerate(zip(cut.size, cut.window, strict=True)):
        x = g.gather(x, Cut((extent,), (window,), cut.spread).pixels(), 1 + 2 * axis)
    order = Cut(cut.size, cut.window).order()
    assert len(order) == 2 * rank + 2
    return g.reshape(g.transpose(x, *order), -1, cut.tokens, channels)


def by_flat_gather(g: Builder, x: str, cut: Cut, channels: int) -> str:
    """One gather of flat pixel numbers."""
    flat = g.reshape(x, -1, math.prod(cut.size), channels)
    return g.reshape(g.gather(flat, cut.pixels(), 1), -1, cut.tokens, channels)


def merged_by_flat_gather(g: Builder, tokens: str, cut: Cut, channels: int) -> str:
    flat = g.reshape(tokens, -1, math.prod(cut.size), channels)
    return g.reshape(g.gather(flat, np.argsort(cut.pixels().reshape(-1)), 1), -1, *cut.size, channels)


def by_as_strided(batch: int) -> Partition:
    """torch.as_strided of a whole batch, as its export reads it: one gather of the flattened tensor."""

    def write(g: Builder, x: str, cut: Cut, channels: int) -> str:
        pixels = cut.pixels() + np.arange(batch)[:, None, None] * math.prod(cut.size)
        elements = pixels[..., None] * channels + np.arange(channels)
        return g.gather(g.reshape(x, -1), elements.reshape(-1, cut.tokens, channels), 0)

    write.__qualname__ = "by_as_strided"
    return write


PARTITIONS: list[Partition] = [
    by_reshape,
    axis_by_axis,
    by_slices,
    by_token_slices,
    by_axis_gathers,
    by_flat_gather,
]
MERGES: list[Partition] = [merged_by_reshape, merged_axis_by_axis, merged_by_concat, merged_by_flat_gather]


@dataclass(frozen=True)
class Moves:
    """A map becomes windows of tokens and comes back: padded, rolled, cut; the counterpart of onnx_movement.Movement.

    layout: of the map outside, "last", "first" (channels first) or "tokens" (`[B, L, C]`).
    """

    partition: Partition
    merge: Partition
    roll: Roll | None = None
    spread: bool = False
    layout: str = "last"
    pad_value: float = 0.0

    @property
    def axes(self) -> tuple[int, int]:
        """What a WindowSpelling asks in order to know whether channels come first."""
        return (2, 3) if self.layout == "first" else (1, 2)

    def enter(self, g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
        x = self.to_map(g, x, geometry, channels)
        if geometry.shift_padded:
            x = self._rolled(g, self._padded(g, x, geometry), geometry, 1, geometry.padded_size)
        else:
            x = self._padded(g, self._rolled(g, x, geometry, 1, geometry.feature_size), geometry)
        return self.partition(g, x, self._cut(geometry), channels)

    def leave(self, g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
        x = self.merge(g, tokens, self._cut(geometry), channels)
        if geometry.shift_padded:
            x = self._cropped(g, self._rolled(g, x, geometry, -1, geometry.padded_size), geometry)
        else:
            x = self._rolled(g, self._cropped(g, x, geometry), geometry, -1, geometry.feature_size)
        rank = len(geometry.feature_size)
        if self.layout == "first":
            return g.transpose(x, 0, 1 + rank, *range(1, 1 + rank))
        return g.reshape(x, -1, math.prod(geometry.feature_size), channels) if self.layout == "tokens" else x

    def to_map(self, g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
        """The map `[B, *S, C]`, whatever its layout."""
        rank = len(geometry.feature_size)
        if self.layout == "first":
            return g.transpose(x, 0, *range(2, 2 + rank), 1)
        return g.reshape(x, -1, *geometry.feature_size, channels) if self.layout == "tokens" else x

    def _cut(self, geometry: WindowGeometry) -> Cut:
        return Cut(geometry.padded_size, geometry.window_size, self.spread)

    def _rolled(self, g: Builder, x: str, geometry: WindowGeometry, sign: int, sizes: Sizes) -> str:
        if self.roll is None or not any(geometry.shift_size):
            return x
        shifts = [sign * s for s in geometry.shift_size]
        return self.roll(g, x, shifts, range(1, 1 + len(sizes)), sizes)

    def _padded(self, g: Builder, x: str, geometry: WindowGeometry) -> str:
        if not geometry.is_padded:
            return x
        end = [p - e for p, e in zip(geometry.padded_size, geometry.feature_size, strict=True)]
        return g.pad(x, [0] * (2 + len(end)), [0, *end, 0], self.pad_value)

    def _cropped(self, g: Builder, x: str, geometry: WindowGeometry) -> str:
        for axis, (extent, padded) in enumerate(zip(geometry.feature_size, geometry.padded_size, strict=True)):
            if extent != padded:
                x = g.slice(x, 0, extent, 1 + axis)
        return x
