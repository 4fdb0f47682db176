"""How neighbours are read from a map and how gradients go back to it, without a copy for every neighbour.

A map is extended once: along each axis it holds what any slot of any query reads, border included, so that every slot
is a view of it, one slice. Gradients are added up in a map of the same extent through the same views, and what several
positions of it read comes back to the pixel in a fixed order: the same sum in every run.

Letters as in docs/ops.md; maps here are [b, h, d, *S] of b images and h heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from attnrewrite.localattention.geometry import PADDING, NeighborhoodGeometry

_MAP_AXES = 3  # axes before the spatial ones


class Axis:
    """One spatial axis: `table` [E] is the pixel at each extended position, or PADDING; slot t of query i stands at
    `starts[t] + i * step`.
    """

    def __init__(self, geometry: NeighborhoodGeometry, axis: int) -> None:
        slots = geometry.axis_table(axis)
        self.extent, self.queries = geometry.key_size[axis], len(slots)
        if geometry.borders[axis] == "inward":  # neighbourhoods are no shifts of each other: slot after slot
            self.table, self.step = slots.T.reshape(-1), 1
            self.starts = [t * self.queries for t in range(slots.shape[1])]
            return
        positions = geometry.axis_positions(axis)
        first = int(positions.min())
        self.step = geometry.stride[axis]
        self.starts = [int(p) - first for p in positions[0]]
        self.table = np.full(int(positions.max()) - first + 1, PADDING)
        self.table[(positions - first).reshape(-1)] = slots.reshape(-1)

    @property
    def margins(self) -> tuple[int, int] | None:
        """Padding before and behind (negative: what is cut off), where that is all there is to the axis."""
        if not (self.table != PADDING).any():
            return None
        inside = np.flatnonzero(self.table != PADDING)
        start, end = int(inside[0]), int(inside[-1]) + 1
        run = self.table[start:end]
        if not np.array_equal(run, np.arange(run[0], run[0] + len(run))):
            return None
        return start - int(run[0]), len(self.table) - end - (self.extent - int(run[-1]) - 1)

    def readers(self) -> np.ndarray:
        """int64 [times, extent]: the extended positions that read each pixel, E where there are no more."""
        inside = np.flatnonzero(self.table != PADDING)
        order = inside[np.argsort(self.table[inside], kind="stable")]
        pixels = self.table[order]
        turn = np.arange(len(pixels)) - np.searchsorted(pixels, pixels)
        table = np.full((int(turn.max(initial=0)) + 1, self.extent), len(self.table))
        table[turn, pixels] = order
        return table


class Neighbourhood:
    """The extended map of a geometry on a device; made by `neighbourhood_of`."""

    def __init__(self, geometry: NeighborhoodGeometry, device: torch.device) -> None:
        self._geometry, self._device = geometry, device
        self._axes = [Axis(geometry, axis) for axis in range(len(geometry.feature_size))]
        margins = [axis.margins for axis in self._axes]
        self._margins = None if None in margins else [m for m in margins if m is not None]
        self.extent = tuple(len(axis.table) for axis in self._axes)
        outside = np.zeros((), bool)
        for k, axis in enumerate(self._axes):
            along = (axis.table == PADDING).reshape([-1 if a == k else 1 for a in range(len(self._axes))])
            outside = outside | along
        self.outside = torch.from_numpy(outside.copy()).to(device) if outside.any() else None

    def extended(self, feature_map: Tensor, padding: Tensor | None) -> Tensor:
        """[b, h, d, *key_size] -> [b, h, d, *E]. padding [h, d]: what lies outside, zero if None."""
        if self._margins is not None:
            extended = torch.nn.functional.pad(feature_map, [m for pair in reversed(self._margins) for m in pair])
        else:
            extended = feature_map
            for k, axis in enumerate(self._axes):
                index = torch.from_numpy(np.where(axis.table == PADDING, 0, axis.table)).to(self._device)
                extended = extended.index_select(_MAP_AXES + k, index)
            if self.outside is not None:
                extended.masked_fill_(self.outside, 0)
        if padding is not None and self.outside is not None:
            vector = padding.reshape(1, *padding.shape, *[1] * len(self._axes)).to(extended.dtype)
            extended = torch.where(self.outside, vector, extended)
        return extended

    def slots(self, extended: Tensor) -> Iterator[Tensor]:
        """The views [b, h, d, *S] that slot 0, 1 ... of all queries are."""
        for place in np.ndindex(*self._geometry.kernel_size):
            view = extended
            for k, (axis, at) in enumerate(zip(self._axes, place, strict=True)):
                start = axis.starts[at]
                view = view[
                    (slice(None),) * (_MAP_AXES + k)
                    + (slice(start, start + (axis.queries - 1) * axis.step + 1, axis.step),)
                ]
            yield view

    def returned(self, extended: Tensor) -> Tensor:
        """A gradient of the extended map as that of the map."""
        if self._margins is not None:
            margins = [-m for pair in reversed(self._margins) for m in pair]
            return torch.nn.functional.pad(extended, margins)
        if self.outside is not None:
            extended = extended.masked_fill(self.outside, 0)
        for k, axis in enumerate(self._axes):
            at = _MAP_AXES + k
            readers = torch.from_numpy(axis.readers()).to(self._device)
            spare = [0, 0] * (extended.dim() - at - 1) + [0, 1]
            padded = torch.nn.functional.pad(extended, spare)
            total = padded.index_select(at, readers[0])
            for reader in readers[1:]:
                total += padded.index_select(at, reader)
            extended = total
        return extended

    def sum_outside(self, extended: Tensor) -> Tensor:
        """A gradient of the extended map as that of the vector outside, [h, d]."""
        assert self.outside is not None
        flat = extended.flatten(_MAP_AXES)
        return (flat * self.outside.expand(self.extent).reshape(-1)).sum((0, -1))


@lru_cache(maxsize=128)
def neighbourhood_of(geometry: NeighborhoodGeometry, device: torch.device) -> Neighbourhood:
    return Neighbourhood(geometry, device)


@lru_cache(maxsize=128)
def excluded_slots(geometry: NeighborhoodGeometry, device: torch.device) -> Tensor:
    """bool [K, *S]: the slots that are no key at all, of border "exclude"."""
    outside = (geometry.pixels() == PADDING).T
    return torch.from_numpy(outside.reshape(-1, *geometry.feature_size).copy()).to(device)
