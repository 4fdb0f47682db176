"""Where the tokens of windows lie in memory, and how they come from a feature map and go back to one.

A channels-last map of nH heads is rows of head_dim numbers, so windows are gathered by rows, one pass over the memory
with shift, padding, partition and the split into heads in one table. Gradients go back by tables as well: a row of the
map adds up what its readers say in a fixed order, so the sum is the same in every run, on every device.

Letters as in docs/ops.md, L the tokens of all windows and heads of one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import PADDING, Sizes

Device = torch.device


class Rows:
    """A feature map [B, *S, nH*d] as rows of d numbers; where its memory allows it, without a copy."""

    def __init__(self, feature_map: torch.Tensor, num_heads: int) -> None:
        batch, *spatial, channels = feature_map.shape
        pixels, width = math.prod(spatial), channels // num_heads
        step = _pixel_stride(feature_map)
        if step is None or step % width:
            feature_map, step = feature_map.contiguous(), channels
        count = ((batch * pixels - 1) * step + channels) // width
        self.rows = feature_map.as_strided((count, width), (width, 1))
        self.per_pixel = step // width
        self.per_image = pixels * self.per_pixel


def _pixel_stride(feature_map: torch.Tensor) -> int | None:
    """Numbers from one pixel to the next where all pixels of all images lie equally far apart, channels densely."""
    if feature_map.stride(-1) != 1:
        return None
    step = expected = None
    for extent, stride in zip(reversed(feature_map.shape[:-1]), reversed(feature_map.stride()[:-1]), strict=True):
        if extent == 1:
            continue
        if step is None:
            step = expected = stride
        if stride != expected:
            return None
        expected = stride * extent
    return feature_map.shape[-1] if step is None else step


class Tokens:
    """The tokens of the windows of some heads of one image, in the order [nW, heads, N].

    pixels: int64 [nW, heads, N], the flat pixel of each, or PADDING. extent: pixels of the map. Made by `tokens_of`.
    """

    def __init__(self, pixels: np.ndarray, extent: int, first_head: int) -> None:
        self.pixels = pixels
        self.heads = pixels.shape[1]
        self.count = pixels.size
        self._extent = extent
        self._first_head = first_head
        self._outside = np.flatnonzero(pixels.reshape(-1) == PADDING)
        self.gathering = lru_cache(maxsize=8)(self._gathering)
        self.returning = lru_cache(maxsize=8)(self._returning)
        self.outside = lru_cache(maxsize=8)(self._positions_outside)

    @property
    def has_padding(self) -> bool:
        return bool(self._outside.size)

    def _gathering(self, per_pixel: int, images: int, device: Device) -> torch.Tensor:
        """int64 [images * L]: the row of each token, 0 for those outside."""
        heads = np.arange(self._first_head, self._first_head + self.heads)
        rows = np.where(self.pixels == PADDING, 0, self.pixels * per_pixel + heads[:, None]).reshape(-1)
        starts = np.arange(images)[:, None] * (self._extent * per_pixel)
        return torch.from_numpy((starts + rows).reshape(-1)).to(device)

    def _returning(self, images: int, device: Device) -> list[torch.Tensor]:
        """int64 [images * pixels * heads], one for every time that a pixel may be read: the token that reads it;
        images * L, the row behind the last, where there is none.
        """
        targets = (self.pixels * self.heads + np.arange(self.heads)[:, None]).reshape(-1)
        inside = np.flatnonzero(self.pixels.reshape(-1) != PADDING)
        inside = inside[np.argsort(targets[inside], kind="stable")]
        sorted_targets = targets[inside]
        first = np.flatnonzero(np.r_[True, sorted_targets[1:] != sorted_targets[:-1]]) if inside.size else inside
        lengths = np.diff(np.r_[first, inside.size])
        turn = np.arange(inside.size) - np.repeat(first, lengths)
        readers = np.full((int(lengths.max(initial=1)), self._extent * self.heads), -1)
        readers[turn, sorted_targets] = inside
        none = images * self.count
        by_image = [np.where(readers < 0, none, readers + image * self.count) for image in range(images)]
        return [torch.from_numpy(row).to(device) for row in np.concatenate(by_image, axis=1)]

    def _positions_outside(self, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [tokens outside]: their positions among the L, and their heads, from 0."""
        heads = np.broadcast_to(np.arange(self.heads)[:, None], self.pixels.shape).reshape(-1)[self._outside]
        return torch.from_numpy(self._outside).to(device), torch.from_numpy(np.ascontiguousarray(heads)).to(device)

    def gather(self, rows: Rows, image: int, images: int, padding: torch.Tensor | None) -> torch.Tensor:
        """[images * nW * heads, N, d] of the map's images from `image` on. padding [heads, d]: what stands outside."""
        index = self.gathering(rows.per_pixel, images, rows.rows.device)
        gathered = rows.rows[image * rows.per_image :].index_select(0, index)
        width = gathered.shape[-1]
        if self.has_padding:
            per_image = gathered.view(images, self.count, width)
            positions, heads = self.outside(gathered.device)
            if padding is None:
                per_image.index_fill_(1, positions, 0)
            else:
                filling = padding.to(gathered.dtype).index_select(0, heads)
                per_image.index_copy_(1, positions, filling.expand(images, -1, -1))
        return gathered.view(-1, self.pixels.shape[2], width)

    def put_back(self, tokens: torch.Tensor, images: int, target: torch.Tensor) -> None:
        """[images * nW * heads, N, d] -> target [images, pixels, heads, d]: every pixel the sum over its tokens."""
        flat = tokens.reshape(images * self.count, -1)
        readers = self.returning(images, flat.device)
        if len(readers) > 1 or self.has_unread:
            flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
        if len(readers) == 1 and target.is_contiguous():
            torch.index_select(flat, 0, readers[0], out=target.view(-1, flat.shape[1]))
            return
        total = flat.index_select(0, readers[0])
        for reader in readers[1:]:
            total += flat.index_select(0, reader)
        target.copy_(total.view(target.shape))

    @cached_property
    def has_unread(self) -> bool:
        """Whether some pixel is read by no token of some head."""
        of_heads = self.pixels.swapaxes(0, 1)
        return any(np.unique(own[own != PADDING]).size < self._extent for own in of_heads)

    def sum_outside(self, tokens: torch.Tensor, images: int) -> torch.Tensor:
        """[images * nW * heads, N, d] -> [heads, d]: the sum over the tokens outside the map."""
        positions, heads = self.outside(tokens.device)
        outside = tokens.reshape(images, self.count, -1).index_select(1, positions).sum(0)
        mine = heads == torch.arange(self.heads, device=heads.device)[:, None]
        return mine.to(outside.dtype) @ outside


@lru_cache(maxsize=512)
def tokens_of(spec: FlashWindowAttention, side: str, first_head: int, heads: int) -> Tokens:
    """The tokens that `heads` heads from `first_head` on have as queries or keys (side: "query" or "key")."""
    geometry = spec.geometry
    if side == "query" and spec.shared_query:
        count = geometry.tokens_per_window
        own = np.broadcast_to(np.arange(count), (geometry.num_windows, heads, count))
        return Tokens(np.ascontiguousarray(own), count, first_head)
    tables = []
    for run, own_geometry in spec.runs_of_heads():
        pixels = own_geometry.pixels() if side == "query" else own_geometry.key_pixels()
        tables += [pixels] * run
    extent = _product(geometry.feature_size if side == "query" else geometry.key_size)
    return Tokens(np.stack(tables[first_head : first_head + heads], axis=1), extent, first_head)


@lru_cache(maxsize=256)
def region_penalty(
    spec: FlashWindowAttention, first_head: int, heads: int, dtype: torch.dtype, device: Device
) -> torch.Tensor:
    """[nW, heads or 1, N, N]: mask_value where query and key lie in different regions, 0 elsewhere."""
    runs = spec.runs_of_heads()
    if len(runs) == 1:
        crossing = runs[0][1].crosses_regions()[:, None]
    else:
        tables = [own.crosses_regions() for run, own in runs for _ in range(run)]
        crossing = np.stack(tables[first_head : first_head + heads], axis=1)
    penalty = torch.zeros(crossing.shape, dtype=dtype)
    assert spec.mask_value is not None
    return penalty.masked_fill_(torch.from_numpy(crossing), spec.mask_value).to(device)


def _product(extents: Sizes | Sequence[int]) -> int:
    return math.prod(extents)
