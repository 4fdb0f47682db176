"""Views of a map with more axes, on which dilated windows are plain ones."""

from __future__ import annotations

import numpy as np

from attnrewrite.localattention.geometry import PADDING


def dilated_view(spatial: tuple[int, ...], window: np.ndarray) -> tuple[int, ...] | None:
    """The map with every axis along which a window takes each s-th position split into (extent // s, s); None if none.

    window: int64 [N], the flat pixels of one window. (16, 16) seen by a window of every second row and column is
    (8, 2, 8, 2): there it covers 8 x 1 x 8 x 1.
    """
    if (window == PADDING).any():
        return None
    sizes: list[int] = []
    for coordinates, extent in zip(np.unravel_index(window, spatial), spatial, strict=True):
        steps = np.unique(np.diff(np.unique(coordinates)))
        step = int(steps[0]) if len(steps) == 1 else 1
        sizes += [extent // step, step] if step > 1 and extent % step == 0 else [extent]
    return tuple(sizes) if len(sizes) > len(spatial) else None
