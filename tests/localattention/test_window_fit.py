"""Key windows are found from the pixels they list, in whatever order a window lists its tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attnrewrite.localattention.geometry import KEY_BORDERS, KeyWindows, WindowGeometry
from attnrewrite.localattention.window_fit import fit_keys

# (feature size, window, key window, stride, offset, dilation, key map)
PLACES = {
    "halo": ((6, 8), (3, 4), (7, 6), (3, 4), (-2, -1), (1, 1), (6, 8)),
    "one-window-down": ((4, 9), (4, 3), (6, 5), (4, 3), (-1, -2), (1, 1), (4, 9)),
    "dilated": ((6, 6), (3, 3), (4, 4), (3, 3), (-3, -2), (2, 2), (6, 6)),
    "downsampled-keys": ((6, 12), (3, 4), (3, 2), (1, 2), (-1, 0), (1, 1), (2, 6)),
    "one-axis": ((12,), (3,), (7,), (3,), (-2,), (1,), (12,)),
    "three-axes": ((2, 4, 6), (1, 2, 3), (1, 4, 3), (1, 2, 3), (0, -1, 0), (1, 1, 1), (2, 4, 6)),
}


@pytest.mark.parametrize("border", KEY_BORDERS)
@pytest.mark.parametrize("place", PLACES)
def test_keys_are_found_in_any_order_of_tokens(place: str, border: str) -> None:
    feature, window, key_window, stride, offset, dilation, key_size = PLACES[place]
    keys = KeyWindows(key_size, key_window, stride, offset, dilation, border)
    queries = WindowGeometry(feature, window, (0,) * len(feature))
    table = replace(queries, keys=keys).key_pixels()
    for seed in range(3):
        shuffled = table[:, np.random.default_rng(seed).permutation(table.shape[1])]
        found = fit_keys(shuffled, key_size, queries)
        assert not isinstance(found, str), found
        geometry, order = found
        np.testing.assert_array_equal(shuffled[:, order], geometry.key_pixels())
    in_order = fit_keys(table, key_size, queries)
    assert not isinstance(in_order, str)
    np.testing.assert_array_equal(in_order[1], np.arange(table.shape[1]))


def test_windows_that_list_their_tokens_in_different_orders_are_declined() -> None:
    queries = WindowGeometry((6, 8), (3, 4), (0, 0))
    keys = KeyWindows((6, 8), (5, 6), (3, 4), (-1, -1), (1, 1), "edge")
    table = replace(queries, keys=keys).key_pixels()
    table[1] = np.roll(table[1], 1)
    assert fit_keys(table, (6, 8), queries) == (
        "12 queries attend 30 keys, which are no rectangle of pixels around the query's window"
    )
