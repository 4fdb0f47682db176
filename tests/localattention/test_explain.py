"""What `explain` shows of a site is what its queries read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import attnrewrite
from attnrewrite.localattention.geometry import PADDING, NeighborhoodGeometry, WindowGeometry
from attnrewrite.localattention.site import Reading
from tests.models.onnx_near_misses import DENSE, NEAR_MISSES
from tests.models.onnx_spellings import SPELLINGS


def readings(model: onnx.ModelProto) -> tuple[Reading, ...]:
    (site,) = attnrewrite.explain(model)
    return site.readings


def points(pixels: np.ndarray, size: tuple[int, ...]) -> set[tuple[int, ...]]:
    inside = pixels[pixels != PADDING]
    return {tuple(int(c) for c in point) for point in zip(*np.unravel_index(inside, size), strict=True)}


@pytest.mark.parametrize("name", ["window-shifted", "window-unshifted", "window-pad-then-shift"])
def test_a_query_is_shown_with_the_pixels_of_its_window(name: str) -> None:
    (site,) = attnrewrite.explain(SPELLINGS[name].model())
    assert site.feature_size is not None
    assert site.window_size is not None
    assert site.shift_size is not None
    geometry = WindowGeometry(site.feature_size, site.window_size, site.shift_size, name == "window-pad-then-shift")
    for shown in site.readings:
        assert shown.query_size == shown.size == site.feature_size
        flat = np.ravel_multi_index(shown.query, site.feature_size)
        (window,) = (row for row in geometry.pixels() if flat in row)
        assert set(shown.reads) == set(shown.together) == points(window, site.feature_size)
        assert shown.padding == int((window == PADDING).sum())
    assert len(site.readings) == (1 if name == "window-unshifted" else 2)


def test_a_query_is_shown_with_its_neighbourhood() -> None:
    (site,) = attnrewrite.explain(SPELLINGS["neighborhood-k3-by-5"].model())
    assert site.feature_size is not None
    assert site.kernel_size is not None
    assert site.dilation is not None
    table = NeighborhoodGeometry(site.feature_size, site.kernel_size, site.dilation).pixels()
    middle, last = site.readings
    for shown in (middle, last):
        row = table[np.ravel_multi_index(shown.query, site.feature_size)]
        assert set(shown.reads) == points(row, site.feature_size)
        assert shown.together == (shown.query,)
        assert shown.padding == int((row == PADDING).sum())


def test_keys_that_a_mask_excludes_are_not_read() -> None:
    """All tokens attend all, and a constant mask leaves a neighbourhood: that is shown."""
    (site,) = attnrewrite.explain(DENSE.model())
    assert site.feature_size is not None and site.kernel_size is not None and site.dilation is not None
    table = NeighborhoodGeometry(site.feature_size, site.kernel_size, site.dilation, "exclude").pixels()
    for shown in site.readings:
        row = table[np.ravel_multi_index(shown.query, site.feature_size)]
        assert set(shown.reads) == points(row, site.feature_size)
        assert shown.together == (shown.query,)


def test_the_values_that_come_from_elsewhere_are_shown() -> None:
    *_, shown = readings(NEAR_MISSES["window-values-shifted-otherwise"].model())
    assert (shown.what, shown.note) == ("values", "the first query whose values come from elsewhere")
    assert set(shown.reads) != set(shown.together)


def test_keys_of_another_window_are_shown() -> None:
    shown = readings(NEAR_MISSES["window-keys-shifted-otherwise"].model())[0]
    assert shown.what == "keys"
    assert len(shown.reads) == len(shown.together)
    assert set(shown.reads) != set(shown.together)


def test_nothing_is_shown_where_the_maps_cannot_be_read() -> None:
    assert readings(NEAR_MISSES["window-softmax-over-queries"].model()) == ()
