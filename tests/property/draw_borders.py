"""Random geometries beyond plain windows and zero borders: halos, borders, strides and dense attention under a mask."""

from __future__ import annotations

import random
from typing import Literal

import numpy as np

from attnrewrite.localattention.geometry import PADDING, KeyWindows, NeighborhoodGeometry, WindowGeometry
from tests.models import onnx_borders as borders
from tests.models import onnx_halos as halos
from tests.models.onnx_borders import BorderSpelling, DenseSpelling
from tests.models.onnx_halos import HaloSpelling
from tests.models.onnx_windows import Expected

HALO_GATHERINGS = [
    halos.by_im2col,
    halos.by_im2col_channels_first,
    halos.by_slices,
    halos.by_strided_slices,
    halos.tokens_by_columns,
]
BLOCK_GATHERINGS = [halos.by_neighbouring_blocks, halos.by_gathered_blocks, halos.by_slices]
MASKS = ["add", "where", "where-allowed", "lowest"]
EXCLUDED = [-np.inf, float(np.finfo(np.float32).min), -100.0]


def draw_halo(r: random.Random, opset: int) -> tuple[HaloSpelling, list[str]]:
    """Windows of 2 to 5 a side on a map, or blocks of a sequence, whose keys reach further at either end."""
    blocks = r.random() < 0.25
    if blocks:
        window: tuple[int, ...] = (r.randint(2, 5),)
        reach = [(n * window[0], m * window[0]) for n, m in [r.choice([(1, 0), (1, 1), (0, 1), (2, 0)])]]
        gatherings = BLOCK_GATHERINGS
    else:
        window = (r.randint(2, 5), r.randint(2, 5))
        reach = [(r.randint(0, w), r.randint(0, w)) for w in window]
        if not any(map(any, reach)):
            reach[0] = (1, 1)
        gatherings = HALO_GATHERINGS
    size = tuple(w * r.randint(2, 3) for w in window)
    modes = ["padding", "padding", "padding"]
    if not blocks:  # what the end of a map is continued with reaches no further than the map
        modes += ["edge", "reflect", *(["wrap"] if opset >= 19 else [])]
    border = r.choice(modes)
    if border == "padding" and not blocks:
        gatherings = [*gatherings, halos.by_flat_gather, halos.by_one_hot_convolution]
    geometry = WindowGeometry(size, window, (0,) * len(window))
    key_window = tuple(b + w + a for w, (b, a) in zip(window, reach, strict=True))
    offset = tuple(-b for b, _ in reach)
    keys = KeyWindows(size, key_window, window, offset, (1,) * len(window), border)
    geometry = WindowGeometry(size, window, (0,) * len(window), keys=keys)
    outside = bool((geometry.key_pixels() == PADDING).any())
    masked_by = r.choice([None, *EXCLUDED]) if outside else None
    gathering, values = r.choice(gatherings), r.choice([None, *gatherings])
    if halos.tokens_by_columns in (gathering, values):  # both in one order of tokens
        gathering = values = halos.tokens_by_columns
    spelling = HaloSpelling(
        gathering,
        geometry,
        r.choice(["tokens", "map"]),
        biased=r.random() < 0.5,
        masked_by=masked_by,
        values=values,
        batch=r.choice([1, 2, "batch"]),
        opset=opset,
    )
    names = [f"halo/gathering/{gathering.__name__}", f"halo/border/{border}", f"halo/project/{spelling.project}"]
    names += [f"halo/masked_by/{spelling.masked_by}", f"halo/axes/{len(window)}"]
    return spelling, [*names, f"batch/{spelling.batch}"]


def _neighborhood(r: random.Random, axes: int, border: str) -> NeighborhoodGeometry:
    """A map with room for the whole neighbourhood, so that every border reads pixels that are there."""
    kernel = tuple(r.choice([3, 3, 5] if border == "inward" else [2, 3, 3, 4, 5]) for _ in range(axes))
    dilation = tuple(r.choice([1, 1, 2]) for _ in range(axes))
    size = tuple(d * (k - 1) + 1 + r.randint(2, 5) for k, d in zip(kernel, dilation, strict=True))
    return NeighborhoodGeometry(size, kernel, dilation, border)


def draw_border(r: random.Random, opset: int) -> tuple[BorderSpelling, list[str]]:
    """Neighbourhoods of one to three axes with any border, even sizes, strides and offsets."""
    border = r.choice(["zero", "exclude", "inward", "replicate", "reflect", "wrap", "constant"])
    axes = r.choice([1, 2, 2, 2, 2, 3])
    geometry = _neighborhood(r, axes, border)
    what = "centred"
    if border in ("zero", "exclude") and r.random() < 0.4:
        what = "off-centre"
        offset = tuple(-r.randrange(k) * d for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True))
        geometry = NeighborhoodGeometry(
            geometry.feature_size, geometry.kernel_size, geometry.dilation, border, offset=offset
        )
    elif border == "zero" and r.random() < 0.5:
        what = "strided"
        stride = tuple(r.randint(1, 2) for _ in range(axes))
        size = tuple(-(-e // s) for e, s in zip(geometry.feature_size, stride, strict=True))
        geometry = NeighborhoodGeometry(
            size, geometry.kernel_size, geometry.dilation, border, key_size=geometry.feature_size, stride=stride
        )
    pad_value = 0.0
    match border:
        case "inward":
            ways = [borders.by_table, borders.by_axis_tables] if axes == 2 else [borders.by_table]
        case "exclude":
            ways = [borders.by_padding("constant"), borders.by_padding("edge"), borders.by_table]
        case "wrap":
            ways = [borders.by_table, *([borders.by_padding("wrap")] if opset >= 19 else [])]
            ways += [borders.by_wrapping] if what == "centred" else []
        case "constant":
            pad_value = 1.25
            ways = [borders.by_padding("constant", pad_value)]
        case _:
            ways = [borders.by_padding({"zero": "constant", "replicate": "edge"}.get(border, border))]
    mask = r.choice(MASKS) if border == "exclude" else r.choice(["none", "-100"]) if border == "zero" else "none"
    biased = r.choice(["none", "slot", "pixel"])
    spelling = BorderSpelling(
        r.choice(ways),
        geometry=geometry,
        bias=biased == "slot",
        pixel_bias=biased == "pixel",
        mask=mask,
        pad_value=pad_value,
        batch=r.choice([1, 2, "batch"]),
        opset=opset,
    )
    names = [
        f"border/{border}",
        f"border/{what}",
        f"border/axes/{axes}",
        f"border/mask/{mask}",
        f"border/bias/{biased}",
    ]
    return spelling, [*names, f"batch/{spelling.batch}"]


def draw_dense(r: random.Random, opset: int) -> tuple[DenseSpelling, list[str]]:
    """All tokens to all tokens, under a mask that leaves every one its neighbourhood, or its window."""
    biased, mask, batch = r.random() < 0.5, r.choice(MASKS), r.choice([1, 2, "batch"])
    bias: Literal["constant", "none"] = "constant" if biased else "none"
    if r.random() < 0.4:
        axes = r.choice([1, 2, 2, 3])
        window = tuple(r.randint(2, 4 if axes < 3 else 2) for _ in range(axes))
        size = tuple(w * r.randint(2, 3 if axes < 3 else 2) for w in window)
        shift = tuple(r.randrange(w) if r.random() < 0.3 else 0 for w in window)
        windows = WindowGeometry(size, window, shift)
        spelling = DenseSpelling(
            Expected("window", windows, bias, "constant"), _tokens_of(windows), mask, biased, batch, opset=opset
        )
        names = [f"dense/{'shifted-windows' if any(shift) else 'windows'}", f"dense/axes/{axes}"]
        return spelling, [*names, f"dense/mask/{mask}", f"batch/{batch}"]
    border = r.choice(["exclude", "inward", "wrap"])
    geometry = _neighborhood(r, r.choice([1, 2, 2, 3]), border)
    expected = Expected("neighborhood", geometry, bias, "constant")
    spelling = DenseSpelling(expected, geometry.pixels(), mask, biased, batch, opset=opset)
    names = [f"dense/{border}", f"dense/mask/{mask}", f"dense/axes/{len(geometry.kernel_size)}"]
    return spelling, [*names, f"batch/{batch}"]


def _tokens_of(geometry: WindowGeometry) -> np.ndarray:
    """int64 [P, N]: for every pixel the pixels of its window."""
    pixels = geometry.pixels()
    table = np.empty((pixels.size, pixels.shape[1]), np.int64)
    table[pixels] = pixels[:, None, :]
    return table
