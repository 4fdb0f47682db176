"""Arrays over the grid of a site: what each of its points reads, collected along some axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attnrewrite.dims import Dim, Extent, Shape
from attnrewrite.indexing.map import Index, IndexingError
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.geometry import PADDING
from attnrewrite.localattention.tokens import Candidate


def count(extent: Extent) -> int:
    """How many positions of an axis the grid enumerates: all, or those within one element of a symbolic batch."""
    return extent.terms[0][1] if isinstance(extent, Dim) else extent


def flat_pixels(
    candidate: Candidate,
    tokens: Sequence[int],
    shape: Sequence[Extent],
    axes: Sequence[int],
    extra: Sequence[tuple[int, int]] = (),
) -> np.ndarray:
    """Row-major position among the token axes that each grid point reads, PADDING outside the domain.

    axes: the grid axes to keep, in order, with extents from `shape`; extra: further (axis, extent) pairs after them.
    Every other grid axis must not matter. Returns int64 with one axis per kept grid axis.
    """
    flat = pixels_read(candidate, tokens)
    kept = [(a, count(shape[a])) for a in axes] + list(extra)
    return spread(flat, kept)


def pixels_read(candidate: Candidate, tokens: Sequence[int]) -> np.ndarray:
    """int64 over the grid: row-major position among the token axes, PADDING outside the domain."""
    flat = row_major(candidate.index, tokens, candidate.value.known_shape)
    return flat if candidate.domain is None else np.where(candidate.domain, flat, PADDING)


def row_major(index: Index, axes: Sequence[int], shape: Shape) -> np.ndarray:
    """int64 over the grid: position among these axes of a tensor, within one element of a symbolic batch."""
    flat: np.ndarray = np.zeros((1,) * index[0].rank, np.int64)
    for axis in axes:
        flat = flat * count(shape[axis]) + index[axis].values
    return flat


def spread(array: np.ndarray, kept: Sequence[tuple[int, int]]) -> np.ndarray:
    """Keep these (grid axis, extent) pairs, in this order, broadcast to their extents; all other axes must have extent
    1.
    """
    order = [a for a, _ in kept]
    rest = [a for a in range(array.ndim) if a not in order]
    if any(array.shape[a] != 1 for a in rest):
        raise IndexingError("the tokens read differ from channel to channel or head to head")
    moved = array.transpose(order + rest).reshape([array.shape[a] for a in order])
    return np.broadcast_to(moved, [e for _, e in kept])


def grouped(array: np.ndarray, groups: list[list[int]], attention: Attention) -> np.ndarray:
    """Collect grid axes into one axis per group; a group the array does not depend on keeps extent 1."""
    kept = []
    result_shape = []
    for group in groups:
        extents = [array.shape[a] for a in group]
        if all(e == 1 for e in extents):
            result_shape.append(1)
            kept += [(a, 1) for a in group]
            continue
        full = [_grid_extent(attention, a) for a in group]
        result_shape.append(math.prod(full))
        kept += list(zip(group, full, strict=True))
    return spread(array, kept).reshape(result_shape)


def _grid_extent(attention: Attention, axis: int) -> int:
    if axis == attention.key_axis:
        return attention.num_keys
    return attention.head_dim if axis == attention.channel_axis else count(attention.output_shape[axis])
