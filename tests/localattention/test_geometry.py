"""Closed forms against the code that models are written in: roll, pad, reshape, transpose, and loops."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from attnrewrite.localattention.geometry import (
    PADDING,
    KeyWindows,
    NeighborhoodGeometry,
    WindowGeometry,
    ceil_to_multiple,
)

WINDOWS = [
    WindowGeometry((8, 12), (4, 4), (0, 0)),
    WindowGeometry((8, 12), (4, 4), (2, 2)),
    WindowGeometry((8, 12), (2, 3), (1, 2)),
    WindowGeometry((8, 12), (4, 12), (2, 0)),
    WindowGeometry((7, 10), (4, 4), (2, 2)),
    WindowGeometry((7, 10), (4, 4), (2, 2), True),
    WindowGeometry((7, 10), (4, 4), (1, 3), True),
    WindowGeometry((3, 5), (4, 4), (0, 0)),
    WindowGeometry((21,), (7,), (3,)),
    WindowGeometry((4, 6, 10), (2, 3, 5), (1, 1, 2)),
    WindowGeometry((3, 5, 7), (2, 3, 4), (1, 0, 2), True),
]


def partition(x: np.ndarray, geometry: WindowGeometry) -> np.ndarray:
    """[*padded] -> [nW, N], as Swin writes it for any number of axes."""
    axes = len(geometry.window_size)
    split = [e for grid, window in zip(geometry.grid, geometry.window_size, strict=True) for e in (grid, window)]
    order = [2 * a for a in range(axes)] + [2 * a + 1 for a in range(axes)]
    return x.reshape(split).transpose(order).reshape(geometry.num_windows, -1)


def ends(geometry: WindowGeometry) -> list[tuple[int, int]]:
    return [(0, p - e) for p, e in zip(geometry.padded_size, geometry.feature_size, strict=True)]


@pytest.mark.parametrize("geometry", WINDOWS, ids=str)
def test_windows_are_roll_pad_and_partition(geometry: WindowGeometry) -> None:
    x = np.arange(np.prod(geometry.feature_size)).reshape(geometry.feature_size)
    shift, axes = [-s for s in geometry.shift_size], tuple(range(x.ndim))
    if geometry.shift_padded:
        x = np.roll(np.pad(x, ends(geometry), constant_values=PADDING), shift, axes)
    else:
        x = np.pad(np.roll(x, shift, axes), ends(geometry), constant_values=PADDING)
    np.testing.assert_array_equal(geometry.pixels(), partition(x, geometry))


@pytest.mark.parametrize("geometry", WINDOWS, ids=str)
def test_regions_are_those_of_swin(geometry: WindowGeometry) -> None:
    """The reference implementation numbers the regions slice by slice; only equality of the numbers counts."""
    labels = np.zeros(geometry.padded_size, np.int64)
    slices = [
        [slice(0, -w), slice(-w, -s), slice(-s, None)] if s else [slice(None)]
        for w, s in zip(geometry.window_size, geometry.shift_size, strict=True)
    ]
    for number, region in enumerate(itertools.product(*slices)):
        labels[region] = number
    windows = partition(labels, geometry)
    np.testing.assert_array_equal(geometry.crosses_regions(), windows[:, :, None] != windows[:, None, :])


@pytest.mark.parametrize(
    ("geometry", "merged"),
    [
        (WindowGeometry((6, 7), (1, 7), (0, 0)), WindowGeometry((42,), (7,), (0,))),
        (WindowGeometry((6, 7), (6, 7), (0, 0)), WindowGeometry((42,), (42,), (0,))),
        (WindowGeometry((5, 8, 12), (1, 4, 4), (0, 2, 2)), WindowGeometry((5, 8, 12), (1, 4, 4), (0, 2, 2))),
        (WindowGeometry((6, 8), (3, 8), (0, 0)), WindowGeometry((6, 8), (3, 8), (0, 0))),
        (WindowGeometry((6, 7), (1, 7), (0, 3)), WindowGeometry((6, 7), (1, 7), (0, 3))),
        (WindowGeometry((5, 6, 7), (1, 1, 7), (0, 0, 0)), WindowGeometry((5, 42), (1, 7), (0, 0))),
    ],
    ids=str,
)
def test_merged_windows_hold_the_same_pixels(geometry: WindowGeometry, merged: WindowGeometry) -> None:
    assert geometry.merged() == merged
    np.testing.assert_array_equal(geometry.pixels(), merged.pixels())


def side_by_side(size: tuple[int, ...], window: tuple[int, ...]) -> KeyWindows:
    return KeyWindows(size, window, window, (0,) * len(size), (1,) * len(size))


SPLIT = WindowGeometry((3, 4, 5, 2), (1, 4, 1, 2), (0, 0, 0, 0))
HALO = KeyWindows((3, 2, 5, 3), (1, 4, 1, 3), (1, 2, 1, 3), (0, -1, 0, 0), (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("geometry", "merged"),
    [
        (
            replace(SPLIT, keys=side_by_side((3, 2, 5, 3), (1, 2, 1, 3))),
            WindowGeometry((12, 10), (4, 2), (0, 0), keys=side_by_side((6, 15), (2, 3))),
        ),
        (
            WindowGeometry((4, 6), (4, 6), (0, 0), keys=side_by_side((2, 3), (2, 3))),
            WindowGeometry((24,), (24,), (0,), keys=side_by_side((6,), (6,))),
        ),
        (
            replace(SPLIT, keys=HALO),  # keys around a window: the first two axes stay
            WindowGeometry(
                (3, 4, 10),
                (1, 4, 2),
                (0, 0, 0),
                keys=KeyWindows((3, 2, 15), (1, 4, 3), (1, 2, 3), (0, -1, 0), (1,) * 3),
            ),
        ),
    ],
    ids=["split-axes", "one-window", "halo"],
)
def test_merged_windows_have_the_same_keys(geometry: WindowGeometry, merged: WindowGeometry) -> None:
    assert geometry.merged() == merged
    np.testing.assert_array_equal(geometry.pixels(), merged.pixels())
    np.testing.assert_array_equal(geometry.key_pixels(), merged.key_pixels())


@pytest.mark.parametrize(
    "geometry",
    [
        NeighborhoodGeometry((7, 11), (3, 3), (1, 1)),
        NeighborhoodGeometry((7, 11), (3, 5), (2, 1)),
        NeighborhoodGeometry((2, 3), (5, 7), (1, 2)),
        NeighborhoodGeometry((13,), (5,), (3,)),
        NeighborhoodGeometry((3, 5, 4), (3, 1, 3), (1, 1, 2)),
    ],
    ids=str,
)
def test_neighbourhoods_pixel_by_pixel(geometry: NeighborhoodGeometry) -> None:
    size = geometry.feature_size
    flat = np.arange(np.prod(size)).reshape(size)
    taps = [[(t - k // 2) * d for t in range(k)] for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    expected = []
    for pixel in np.ndindex(*size):
        keys = [tuple(p + o for p, o in zip(pixel, offset, strict=True)) for offset in itertools.product(*taps)]
        inside = [all(0 <= p < e for p, e in zip(key, size, strict=True)) for key in keys]
        expected.append([int(flat[k]) if i else PADDING for k, i in zip(keys, inside, strict=True)])
    np.testing.assert_array_equal(geometry.pixels(), expected)
    assert geometry.keys_per_query == len(expected[0])


def neighbour(position: int, start: int, extent: int, step: int, kernel: int, border: str) -> int:
    """Which pixel of one axis a slot at `position` reads, its neighbourhood beginning at `start`; one at a time."""
    match border:
        case "replicate":
            return min(max(position, 0), extent - 1)
        case "reflect":
            while not 0 <= position < extent:
                position = -position if position < 0 else 2 * (extent - 1) - position
            return position
        case "wrap":
            return position % extent
        case "inward":
            while start < 0:
                start, position = start + step, position + step
            while start + (kernel - 1) * step >= extent:
                start, position = start - step, position - step
            return position
    return position if 0 <= position < extent else PADDING


BORDERED = [
    NeighborhoodGeometry((7, 11), (3, 5), (1, 2), border)
    for border in ("zero", "constant", "exclude", "inward", "replicate", "reflect", "wrap")
] + [
    NeighborhoodGeometry((11,), (3,), (3,), "inward"),
    NeighborhoodGeometry((7, 11), (2, 4), (3, 2), "inward"),
    NeighborhoodGeometry((3, 5, 7), (3, 2, 3), (1, 1, 2), "exclude,inward,wrap", offset=(-2, 0, -2)),
    NeighborhoodGeometry((4, 4), (3, 3), (1, 1), "inward", stride=(2, 3), key_size=(8, 10)),
    NeighborhoodGeometry((4, 5), (2, 3), (1, 1), "exclude", stride=(2, 2), key_size=(7, 9), offset=(0, -1)),
    NeighborhoodGeometry((2, 3), (7, 9), (1, 1), "reflect"),
]


@pytest.mark.parametrize("geometry", BORDERED, ids=str)
def test_neighbours_at_the_border_one_by_one(geometry: NeighborhoodGeometry) -> None:
    expected = []
    for query in np.ndindex(*geometry.feature_size):
        for slot in np.ndindex(*geometry.kernel_size):
            reads = []
            for axis, (i, t) in enumerate(zip(query, slot, strict=True)):
                start = i * geometry.stride[axis] + geometry.offset[axis]
                position = start + t * geometry.dilation[axis]
                step, kernel = geometry.dilation[axis], geometry.kernel_size[axis]
                extent = geometry.key_size[axis]
                reads.append(neighbour(position, start, extent, step, kernel, geometry.borders[axis]))
            inside = PADDING not in reads
            expected.append(int(np.ravel_multi_index(reads, geometry.key_size)) if inside else PADDING)
    np.testing.assert_array_equal(geometry.pixels().reshape(-1), expected)


def test_an_inward_neighbourhood_holds_the_nearest_pixels() -> None:
    """NATTEN's definition: of the pixels a multiple of the dilation away, the k nearest."""
    geometry = NeighborhoodGeometry((17,), (5,), (3,), "inward")
    for pixel, keys in enumerate(geometry.pixels()):
        reachable = [p for p in range(17) if (p - pixel) % 3 == 0]
        furthest = max(abs(k - pixel) for k in keys)
        assert set(keys) <= set(reachable)
        assert all(abs(p - pixel) >= furthest for p in reachable if p not in keys)


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        (((7, 11), (3,), (1, 1)), {}),
        (((7, 11), (3, 3), (1, 1), "mirror"), {}),
        (((7, 11), (3, 3), (1, 1), "zero,exclude"), {}),
        (((7, 11), (3, 3), (3, 1), "inward"), {}),
        (((7, 11), (3, 3), (1, 1)), {"stride": (1, 0)}),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[Any, ...], more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got|border"):
        NeighborhoodGeometry(*sizes, **more)


@pytest.mark.parametrize(("extent", "step", "expected"), [(7, 4, 8), (8, 4, 8), (1, 7, 7), (0, 3, 0)])
def test_ceil_to_multiple(extent: int, step: int, expected: int) -> None:
    assert ceil_to_multiple(extent, step) == expected
