"""Closed forms of local attention geometries, one axis at a time.

A geometry is a product of axes: the pixels of a window are the product of the rows and the columns it covers, and the
neighbours of a pixel the product of its neighbouring rows and columns. So each geometry is a table per spatial axis,
and the N-dimensional geometry is their product. 1-D, 2-D and 3-D feature maps need no code of their own.

Letters: H/W feature-map height/width, N tokens per window, nW windows, K keys per query. An index of PADDING means
"not a pixel of the feature map".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

PADDING = -1

# What a position outside the map reads: nothing (the padding), or a pixel of the map.
KEY_BORDERS = ("padding", "wrap", "edge", "reflect")

Sizes = tuple[int, ...]


def by(sizes: Sizes) -> str:
    """Sizes as people write them: 7x7."""
    return "x".join(map(str, sizes))


def ceil_to_multiple(extent: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `extent`."""
    return -(-extent // step) * step


def product_of_axes(tables: list[np.ndarray], sizes: Sizes) -> np.ndarray:
    """Flat pixel indices of the product of per-axis tables.

    tables: one int64 [groups_i, members_i] array per spatial axis, with PADDING where no pixel is read.
    Returns int64 [prod(groups), prod(members)], both row-major; PADDING as soon as one axis has it.
    """
    flat = np.zeros((1, 1), np.int64)
    for table, extent in zip(tables, sizes, strict=True):
        outer = flat[:, None, :, None] * extent + table[None, :, None, :]
        padded = (flat[:, None, :, None] == PADDING) | (table[None, :, None, :] == PADDING)
        outer = np.where(padded, PADDING, outer)
        flat = outer.reshape(flat.shape[0] * table.shape[0], flat.shape[1] * table.shape[1])
    return flat


def within(position: np.ndarray, extent: int, border: str) -> np.ndarray:
    """Positions along an axis as positions within [0, extent), or PADDING: what `border` (KEY_BORDERS) makes of them.

    "reflect" mirrors without repeating the outermost pixel, as Pad does; an axis of one pixel reads that pixel.
    """
    match border:
        case "padding":
            return np.where((position >= 0) & (position < extent), position, PADDING)
        case "wrap":
            return position % extent
        case "edge":
            return np.clip(position, 0, extent - 1)
        case "reflect":
            period = max(2 * (extent - 1), 1)
            folded = position % period
            return np.where(folded < extent, folded, period - folded)
    raise ValueError(f"no border is called {border!r}; the borders are {', '.join(KEY_BORDERS)}")


def _merges(outer: tuple[int, int, int], inner: tuple[int, int, int]) -> bool:
    """Whether two neighbouring axes (extent, window, shift) are one: windows that hold all of the inner axis."""
    (extent, window, shift), (inner_extent, inner_window, inner_shift) = outer, inner
    return inner_window == inner_extent and inner_shift == shift == 0 and window in (1, extent)


KeyAxis = tuple[int, int, int, int, int]  # extent, window, stride, offset, dilation


def _merges_keys(outer: KeyAxis, inner: KeyAxis) -> bool:
    """The same of the axes of a key map, whose windows must lie side by side."""
    plain = all((stride, offset, dilation) == (window, 0, 1) for _, window, stride, offset, dilation in (outer, inner))
    return plain and _merges((*outer[:2], 0), (*inner[:2], 0))


@dataclass(frozen=True)
class KeyWindows:
    """The key window of each query window, where it is not the query window itself; sizes in pixels, one per axis.

    Key token j of window n reads position n * stride + offset + j * dilation of the shifted key map of extent
    feature_size. Halo: a window_size above the stride. Queries pooled or keys downsampled inside their window: a
    feature_size that is not the queries'. border: what positions outside the map read, one of KEY_BORDERS.
    """

    feature_size: Sizes
    window_size: Sizes
    stride: Sizes
    offset: Sizes
    dilation: Sizes
    border: str = "padding"

    def axes(self) -> list[KeyAxis]:
        """Extent, window, stride, offset and dilation of every axis."""
        sizes = (self.feature_size, self.window_size, self.stride, self.offset, self.dilation)
        return list(zip(*sizes, strict=True))


@dataclass(frozen=True)
class WindowGeometry:
    """Non-overlapping windows over a feature map, cyclically shifted, padded at the end to a multiple of the window.

    feature_size, window_size, shift_size: one entry per spatial axis, in pixels; 0 <= shift < window.
    shift_padded: the cyclic shift runs over the padded map (torchvision, transformers: pad, then roll) or over the map
    itself (timm: roll, then pad). Without padding both are the same geometry, and False is the canonical value.
    keys: the windows that keys and values come from; None where they are those of the queries.
    """

    feature_size: Sizes
    window_size: Sizes
    shift_size: Sizes
    shift_padded: bool = False
    keys: KeyWindows | None = None

    @property
    def padded_size(self) -> Sizes:
        return tuple(ceil_to_multiple(e, w) for e, w in zip(self.feature_size, self.window_size, strict=True))

    @property
    def is_padded(self) -> bool:
        return self.padded_size != self.feature_size

    @property
    def grid(self) -> Sizes:
        """Windows along each axis."""
        return tuple(p // w for p, w in zip(self.padded_size, self.window_size, strict=True))

    @property
    def num_windows(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens_per_window(self) -> int:
        return math.prod(self.window_size)

    @property
    def key_size(self) -> Sizes:
        """Extents of the map that keys and values come from."""
        return self.feature_size if self.keys is None else self.keys.feature_size

    @property
    def keys_per_window(self) -> int:
        return math.prod(self.window_size if self.keys is None else self.keys.window_size)

    def queries(self) -> WindowGeometry:
        """The geometry of the queries alone."""
        return replace(self, keys=None)

    def merged(self) -> WindowGeometry:
        """The same windows with the fewest axes: (n, w) in windows of (1, w) is one axis of n * w in windows of w.

        Windows whose keys lie elsewhere are merged where those of the keys are of this kind as well.
        """
        axes = list(zip(self.feature_size, self.window_size, self.shift_size, strict=True))
        keys = None if self.keys is None else self.keys.axes()
        at = 0
        while at + 1 < len(axes):
            if _merges(axes[at], axes[at + 1]) and (keys is None or _merges_keys(keys[at], keys[at + 1])):
                (outer, window, _), (inner, _, _) = axes[at], axes[at + 1]
                axes[at : at + 2] = [(outer * inner, window * inner, 0)]
                if keys is not None:
                    whole, width = keys[at][0] * keys[at + 1][0], keys[at][1] * keys[at + 1][1]
                    keys[at : at + 2] = [(whole, width, width, 0, 1)]
            else:
                at += 1
        feature, window_size, shift = (tuple(a[k] for a in axes) for k in range(3))
        merged = replace(self, feature_size=feature, window_size=window_size, shift_size=shift)
        if self.keys is None or keys is None:
            return merged
        size, key_window, stride, offset, dilation = (tuple(k[i] for k in keys) for i in range(5))
        return replace(merged, keys=KeyWindows(size, key_window, stride, offset, dilation, self.keys.border))

    def axis_table(self, axis: int) -> np.ndarray:
        """int64 [windows, window_size] of one axis: the pixel that each token of each window reads, or PADDING."""
        extent, window, shift = self.feature_size[axis], self.window_size[axis], self.shift_size[axis]
        padded = self.padded_size[axis]
        position = np.arange(padded)
        if self.shift_padded:
            pixel = (position + shift) % padded
            pixel = np.where(pixel < extent, pixel, PADDING)
        else:
            pixel = np.where(position < extent, (position + shift) % extent, PADDING)
        return pixel.reshape(-1, window)

    def pixels(self) -> np.ndarray:
        """int64 [nW, N]: the flat pixel that each token of each window reads, or PADDING; all row-major."""
        return product_of_axes([self.axis_table(a) for a in range(len(self.feature_size))], self.feature_size)

    def key_axis_table(self, axis: int) -> np.ndarray:
        """int64 [windows, key window_size] of one axis: the pixel of the key map each key token reads, or PADDING."""
        if self.keys is None:
            return self.axis_table(axis)
        keys, (extent, shift) = self.keys, self.key_roll(axis)
        starts = np.arange(self.grid[axis])[:, None] * keys.stride[axis] + keys.offset[axis]
        position = starts + np.arange(keys.window_size[axis]) * keys.dilation[axis]
        inside = within(position, extent, keys.border)
        pixel = np.where(inside == PADDING, PADDING, (inside + shift) % extent)
        return np.where(pixel < keys.feature_size[axis], pixel, PADDING)

    def key_roll(self, axis: int) -> tuple[int, int]:
        """(extent that is rolled, shift) of the key map along one axis.

        A key map of another size is rolled by the same part of its extent.
        """
        size = self.key_size[axis]
        if size == self.feature_size[axis]:
            return (self.padded_size[axis] if self.shift_padded else size), self.shift_size[axis]
        return size, self.shift_size[axis] * size // self.feature_size[axis]

    def key_pixels(self) -> np.ndarray:
        """int64 [nW, M]: the flat pixel of the key map that each key token of each window reads, or PADDING."""
        if self.keys is None:
            return self.pixels()
        return product_of_axes([self.key_axis_table(a) for a in range(len(self.feature_size))], self.key_size)

    def regions(self) -> np.ndarray:
        """int64 [nW, N]: the region label Swin gives each token; tokens of one window attend within their region.

        Along a shifted axis of padded extent P the last `shift` positions came around from the other side, so a window
        holds at most two regions per axis: before and from position P - shift.
        Source: img_mask of the reference implementation, https://github.com/microsoft/Swin-Transformer.
        """
        labels = np.zeros((1, 1), np.int64)
        for padded, window, shift in zip(self.padded_size, self.window_size, self.shift_size, strict=True):
            wrapped = (np.arange(padded) >= padded - shift).astype(np.int64).reshape(-1, window)
            outer = labels[:, None, :, None] * 2 + wrapped[None, :, None, :]
            labels = outer.reshape(labels.shape[0] * wrapped.shape[0], labels.shape[1] * window)
        return labels

    def crosses_regions(self) -> np.ndarray:
        """bool [nW, N, N]: query and key are of different regions (where Swin's shift mask adds its penalty)."""
        labels = self.regions()
        return labels[:, :, None] != labels[:, None, :]


# What a neighbour outside the map is: no pixel at all, or which pixel is read in its place.
PADDED_BORDERS = ("zero", "constant", "exclude")
MOVED_BORDERS = ("inward", "replicate", "reflect", "wrap")


@dataclass(frozen=True)
class NeighborhoodGeometry:
    """Every pixel of a query map attends kernel_size pixels of a key map, `dilation` apart.

    feature_size (of the query map), kernel_size, dilation: one entry per spatial axis, in pixels. stride (default 1),
    key_size (default feature_size) and offset (default -dilation * (kernel_size // 2): centred): slot t of query i
    stands at pixel i * stride + offset + t * dilation of the key map.
    border: what a slot outside the key map is. "zero", "constant" (a vector) and "exclude" (no key at all) read no
    pixel: PADDING. "replicate", "reflect" (the edge not repeated) and "wrap" read another pixel. "inward" moves the
    whole neighbourhood of such a query to the nearest place inside, in steps of the dilation (NATTEN). Axes with
    different borders are written apart: "exclude,inward"; at most one kind of them reads no pixel.
    Raises ValueError where a size does not fit.
    Source of "inward": Neighborhood Attention Transformer, https://arxiv.org/abs/2204.07143, and its dilated form,
    https://arxiv.org/abs/2209.15001.
    """

    feature_size: Sizes
    kernel_size: Sizes
    dilation: Sizes
    border: str = "zero"
    stride: Sizes = ()
    key_size: Sizes = ()
    offset: Sizes = ()

    def __post_init__(self) -> None:
        axes = len(self.feature_size)
        if len(self.kernel_size) != axes or len(self.dilation) != axes:
            raise ValueError(f"sizes of {axes} axes do not fit, got {self.kernel_size=}, {self.dilation=}")
        object.__setattr__(self, "stride", self.stride or (1,) * axes)
        object.__setattr__(self, "key_size", self.key_size or self.feature_size)
        object.__setattr__(self, "offset", self.offset or self.centred_offset)
        positive = (self.kernel_size, self.dilation, self.stride, self.key_size)
        if any(len(s) != axes for s in (*positive, self.offset)) or any(e < 1 for s in positive for e in s):
            raise ValueError(f"sizes of {axes} axes do not fit, got {self}")
        borders = set(self.borders)
        if not borders <= {*PADDED_BORDERS, *MOVED_BORDERS} or len(borders & set(PADDED_BORDERS)) > 1:
            raise ValueError(f"there is no border {self.border!r}")
        for axis, border in enumerate(self.borders):
            reach = (self.kernel_size[axis] - 1) * self.dilation[axis]
            if border == "inward" and self.kernel_size[axis] * self.dilation[axis] > self.key_size[axis]:
                raise ValueError(f"a neighbourhood reaching over {reach + 1} pixels does not fit inside, got {self}")

    @property
    def borders(self) -> tuple[str, ...]:
        """The border of every axis."""
        words = tuple(self.border.split(","))
        return words * len(self.feature_size) if len(words) == 1 else words

    @property
    def centred_offset(self) -> Sizes:
        return tuple(-d * (k // 2) for d, k in zip(self.dilation, self.kernel_size, strict=True))

    @property
    def is_plain(self) -> bool:
        """Whether queries and keys share one map and every pixel lies in the middle of its neighbourhood."""
        same = self.key_size == self.feature_size and all(s == 1 for s in self.stride)
        return same and self.offset == self.centred_offset and all(k % 2 for k in self.kernel_size)

    @property
    def keys_per_query(self) -> int:
        return math.prod(self.kernel_size)

    def axis_offsets(self, axis: int) -> np.ndarray:
        """int64 [kernel_size]: key position minus query position * stride along one axis, ascending."""
        return np.arange(self.kernel_size[axis]) * self.dilation[axis] + self.offset[axis]

    def axis_positions(self, axis: int) -> np.ndarray:
        """int64 [extent, kernel_size]: where each key slot of each query stands, inside the map or not."""
        return np.arange(self.feature_size[axis])[:, None] * self.stride[axis] + self.axis_offsets(axis)[None, :]

    def axis_table(self, axis: int) -> np.ndarray:
        """int64 [extent, kernel_size] of one axis: the pixel each key slot of each query reads, or PADDING."""
        position, extent = self.axis_positions(axis), self.key_size[axis]
        match self.borders[axis]:
            case "replicate":
                return np.clip(position, 0, extent - 1)
            case "reflect":
                period = max(2 * (extent - 1), 1)
                folded = position % period
                return np.where(folded < extent, folded, period - folded)
            case "wrap":
                return position % extent
            case "inward":
                kernel, step = self.kernel_size[axis], self.dilation[axis]
                group = position[:, :1] % step  # the pixels a neighbourhood may move over: every step-th
                members = (extent - group + step - 1) // step
                first = np.clip(position[:, :1] // step, 0, members - kernel)
                return (first + np.arange(kernel)) * step + group
        return np.where((position >= 0) & (position < extent), position, PADDING)

    def pixels(self) -> np.ndarray:
        """int64 [P, K]: the flat pixel of the key map that each slot of each query reads, or PADDING; row-major."""
        return product_of_axes([self.axis_table(a) for a in range(len(self.feature_size))], self.key_size)

    def pixels_of(self, queries: np.ndarray) -> np.ndarray:
        """int64 [Q, K]: the rows of `pixels` of these query pixels (flat, int64 [Q]) alone."""
        flat = np.zeros((len(queries), 1), np.int64)
        for axis, positions in enumerate(np.unravel_index(queries, self.feature_size)):
            along = self.axis_table(axis)[positions][:, None, :]
            outside = (flat[:, :, None] == PADDING) | (along == PADDING)
            joined = np.where(outside, PADDING, flat[:, :, None] * self.key_size[axis] + along)
            flat = joined.reshape(len(queries), -1)
        return flat
