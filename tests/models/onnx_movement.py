"""Ways to write the movement around window attention: cyclic shift, partition into windows, and their inverses.

Every roll has the signature `roll(g, x, shifts, axes, sizes)` and does `out[i] = x[(i + shift) mod size]` along each
axis; every partition `(g, x, geometry, channels) -> [B*nW, N, C]` and every merge `(g, tokens, geometry, channels) ->
map`. Maps are `[B, H, W, C]`, except in the functions named `nchw_...`. Letters: B batch, N tokens per window, nW
windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from attnrewrite.localattention.geometry import WindowGeometry
from tests.models.onnx_builder import END, Builder

Roll = Callable[[Builder, str, Sequence[int], Sequence[int], Sequence[int]], str]
Move = Callable[[Builder, str, WindowGeometry, int], str]


def roll_by_slices(g: Builder, x: str, shifts: Sequence[int], axes: Sequence[int], sizes: Sequence[int]) -> str:
    """Concat(x[shift:], x[:shift]) per axis: torch.roll as both exporters write it."""
    for shift, axis in zip(shifts, axes, strict=True):
        if shift:
            x = g.concat([g.slice(x, shift, END, axis), g.slice(x, 0, shift, axis)], axis)
    return x


def roll_columns_first(g: Builder, x: str, shifts: Sequence[int], axes: Sequence[int], sizes: Sequence[int]) -> str:
    return roll_by_slices(g, x, shifts[::-1], axes[::-1], sizes[::-1])


def roll_by_split(g: Builder, x: str, shifts: Sequence[int], axes: Sequence[int], sizes: Sequence[int]) -> str:
    for shift, axis, size in zip(shifts, axes, sizes, strict=True):
        if shift:
            first = shift % size
            x = g.concat(g.split(x, [first, size - first], axis)[::-1], axis)
    return x


def roll_by_gather(g: Builder, x: str, shifts: Sequence[int], axes: Sequence[int], sizes: Sequence[int]) -> str:
    for shift, axis, size in zip(shifts, axes, sizes, strict=True):
        if shift:
            x = g.gather(x, (np.arange(size) + shift) % size, axis)
    return x


def roll_by_repeat(g: Builder, x: str, shifts: Sequence[int], axes: Sequence[int], sizes: Sequence[int]) -> str:
    """Two copies side by side, then the crop that starts at the shift."""
    for shift, axis, size in zip(shifts, axes, sizes, strict=True):
        if shift:
            x = g.slice(g.concat([x, x], axis), shift % size, shift % size + size, axis)
    return x


def roll_by_quadrants(g: Builder, x: str, shifts: Sequence[int], axes: Sequence[int], sizes: Sequence[int]) -> str:
    """Four rectangles cut out of the map and put together the other way round."""
    (down, right), (rows, columns) = shifts, axes
    if not (down and right):
        return roll_by_slices(g, x, shifts, axes, sizes)
    lower, upper = g.slice(x, down, END, rows), g.slice(x, 0, down, rows)
    halves = [
        g.concat([g.slice(half, right, END, columns), g.slice(half, 0, right, columns)], columns)
        for half in (lower, upper)
    ]
    return g.concat(halves, rows)


def roll_by_wrap_pad(g: Builder, x: str, shifts: Sequence[int], axes: Sequence[int], sizes: Sequence[int]) -> str:
    """Pad(mode=wrap) at the end, then crop (opset 19 or later)."""
    for shift, axis, size in zip(shifts, axes, sizes, strict=True):
        if shift:
            extra = [shift % size if a == axis else 0 for a in range(4)]
            x = g.slice(g.pad(x, [0] * 4, extra, mode="wrap"), shift % size, END, axis)
    return x


def partition_by_reshape(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """The view and permute of the Swin reference."""
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(x, -1, rows, height, columns, width, channels), 0, 1, 3, 2, 4, 5)
    return g.reshape(x, -1, height * width, channels)


def merge_by_reshape(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(tokens, -1, rows, columns, height, width, channels), 0, 1, 3, 2, 4, 5)
    return g.reshape(x, -1, *geometry.padded_size, channels)


def partition_in_two_steps(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """Rows of windows first, then the windows of each row; no tensor has more than five axes."""
    (_, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.reshape(x, -1, height, columns, width, channels)  # [B*rows, height, columns, width, C]
    return g.reshape(g.transpose(x, 0, 2, 1, 3, 4), -1, height * width, channels)


def merge_in_two_steps(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    (_, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(tokens, -1, columns, height, width, channels), 0, 2, 1, 3, 4)
    return g.reshape(x, -1, *geometry.padded_size, channels)


def partition_by_slices(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """Every window cut out of the map, then all of them stacked."""
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    windows = []
    for row in range(rows):
        band = g.slice(x, row * height, (row + 1) * height, 1)
        for column in range(columns):
            window = g.slice(band, column * width, (column + 1) * width, 2)
            windows.append(g.reshape(window, -1, 1, height * width, channels))
    return g.reshape(g.concat(windows, 1), -1, height * width, channels)


def merge_by_slices(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    windows = g.reshape(tokens, -1, rows * columns, height, width, channels)
    bands = []
    for row in range(rows):
        band = [g.squeeze(g.slice(windows, row * columns + c, row * columns + c + 1, 1), 1) for c in range(columns)]
        bands.append(g.concat(band, 2))
    return g.concat(bands, 1)


def partition_by_split(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    windows = [
        g.reshape(window, -1, 1, height * width, channels)
        for band in g.split(x, [height] * rows, 1)
        for window in g.split(band, [width] * columns, 2)
    ]
    return g.reshape(g.concat(windows, 1), -1, height * width, channels)


def merge_by_split(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    windows = g.split(g.reshape(tokens, -1, rows * columns, height, width, channels), [1] * (rows * columns), 1)
    bands = [
        g.concat([g.reshape(w, -1, height, width, channels) for w in windows[r * columns : (r + 1) * columns]], 2)
        for r in range(rows)
    ]
    return g.concat(bands, 1)


def partition_by_strides(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """Token (i, j) of all windows at once is x[:, i::height, j::width]; the tokens are stacked."""
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    tokens = []
    for i in range(height):
        band = g.slice(x, i, END, 1, step=height)
        for j in range(width):
            token = g.slice(band, j, END, 2, step=width)  # [B, rows, columns, C]
            tokens.append(g.unsqueeze(g.reshape(token, -1, rows * columns, channels), 2))
    return g.reshape(g.concat(tokens, 2), -1, height * width, channels)


def partition_by_unfold(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """im2col with the window as kernel and stride: a gather of every axis into (window, place in the window)."""
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.gather(x, np.arange(rows)[:, None] * height + np.arange(height), 1)  # [B, rows, height, W, C]
    x = g.gather(
        x, np.arange(columns)[None, :] * width + np.arange(width)[:, None], 3
    )  # [B, rows, height, width, columns, C]
    return g.reshape(g.transpose(x, 0, 1, 4, 2, 3, 5), -1, height * width, channels)


def partition_by_flat_gather(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """One gather of flat pixel numbers; the shift is part of the numbers."""
    height, width = geometry.feature_size
    pixels = g.gather(g.reshape(x, -1, height * width, channels), geometry.pixels(), 1)
    return g.reshape(pixels, -1, geometry.tokens_per_window, channels)


def merge_by_flat_gather(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    height, width = geometry.feature_size
    tokens = g.reshape(tokens, -1, height * width, channels)
    return g.reshape(g.gather(tokens, np.argsort(geometry.pixels().reshape(-1)), 1), -1, height, width, channels)


def nchw_partition_by_reshape(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(x, -1, channels, rows, height, columns, width), 0, 2, 4, 3, 5, 1)
    return g.reshape(x, -1, height * width, channels)


def nchw_merge_by_reshape(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(tokens, -1, rows, columns, height, width, channels), 0, 5, 1, 3, 2, 4)
    return g.reshape(x, -1, channels, *geometry.padded_size)


def nchw_partition_by_space_to_depth(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """SpaceToDepth puts the tokens of a square window among the channels, in the order (row, column, channel)."""
    side = geometry.window_size[0]
    x = g.op("SpaceToDepth", x, blocksize=side)  # [B, side*side*C, rows, columns]
    return g.reshape(g.transpose(x, 0, 2, 3, 1), -1, side * side, channels)


def nchw_merge_by_depth_to_space(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    side = geometry.window_size[0]
    x = g.transpose(g.reshape(tokens, -1, *geometry.grid, side * side * channels), 0, 3, 1, 2)
    return g.op("DepthToSpace", x, blocksize=side, mode="DCR")


def nchw_merge_by_fold(
    g: Builder,
    tokens: str,
    geometry: WindowGeometry,
    channels: int,
    place: Sequence[int] = (0, 1),
    **changes: object,
) -> str:
    """Col2Im with the window as block and stride (opset 18 or later); place: the order of rows and columns in it."""
    sizes, windows = geometry.window_size, math.prod(geometry.grid)
    x = g.transpose(g.reshape(tokens, -1, windows, *sizes, channels), 0, 4, *(2 + a for a in place), 1)
    columns = g.reshape(x, -1, channels * math.prod(sizes), windows)
    strides = {"strides": list(sizes), **changes}
    return g.op("Col2Im", columns, g.constant(list(geometry.padded_size)), g.constant(list(sizes)), **strides)


@dataclass(frozen=True)
class Movement:
    """How a feature map becomes windows of tokens and comes back.

    axes: where height and width lie. roll None: the shift is part of partition and merge. back: the shift of the way
    back, as multiples of the geometry's (-1 undoes it).
    """

    partition: Move = partition_by_reshape
    merge: Move = merge_by_reshape
    roll: Roll | None = roll_by_slices
    axes: tuple[int, int] = (1, 2)
    back: tuple[int, int] = (-1, -1)
    pad_mode: str = "constant"
    pad_value: float = 0.0

    def enter(self, g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
        """The map to tokens `[B*nW, N, channels]`."""
        if geometry.shift_padded:
            x = self._roll(g, self._pad(g, x, geometry), geometry, (1, 1), geometry.padded_size)
        else:
            x = self._pad(g, self._roll(g, x, geometry, (1, 1), geometry.feature_size), geometry)
        return self.partition(g, x, geometry, channels)

    def leave(self, g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
        """Tokens `[B*nW, N, channels]` to the map."""
        x = self.merge(g, tokens, geometry, channels)
        if geometry.shift_padded:
            return self._crop(g, self._roll(g, x, geometry, self.back, geometry.padded_size), geometry)
        return self._roll(g, self._crop(g, x, geometry), geometry, self.back, geometry.feature_size)

    def _roll(
        self, g: Builder, x: str, geometry: WindowGeometry, times: tuple[int, int], sizes: tuple[int, ...]
    ) -> str:
        if self.roll is None:
            return x
        shifts = [shift * n for shift, n in zip(geometry.shift_size, times, strict=True)]
        return self.roll(g, x, shifts, self.axes, sizes)

    def _pad(self, g: Builder, x: str, geometry: WindowGeometry) -> str:
        if not geometry.is_padded:
            return x
        end = [0] * 4
        for axis, extent, padded in zip(self.axes, geometry.feature_size, geometry.padded_size, strict=True):
            end[axis] = padded - extent
        return g.pad(x, [0] * 4, end, self.pad_value, self.pad_mode)

    def _crop(self, g: Builder, x: str, geometry: WindowGeometry) -> str:
        if not geometry.is_padded:
            return x
        for axis, extent in zip(self.axes, geometry.feature_size, strict=True):
            x = g.slice(x, 0, extent, axis)
        return x
