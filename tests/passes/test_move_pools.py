"""Tokens pooled inside their window become pixels of a smaller map, however the pool is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest

from attnrewrite.frontend.onnx import read
from attnrewrite.functions import spec_of
from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import WindowGeometry
from attnrewrite.verify.exact import verify_exact
from tests.models import onnx_movement as movement
from tests.models.onnx_builder import Builder
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

CHANNELS, HEADS = 6, 2
TOLERANCE = 1e-5  # float32 means in another order of summation; 1e-6 is left by all cases, 1e-2 by a wrong pixel
RNG = np.random.default_rng(5)
QKV, QKV_BIAS = RNG.normal(size=(CHANNELS, 3 * CHANNELS)), RNG.normal(size=3 * CHANNELS)

Pool = Callable[[Builder, str, tuple[int, int], tuple[int, int]], str]


def by_average_pool(g: Builder, q: str, window: tuple[int, int], cell: tuple[int, int]) -> str:
    """[G, N, C] -> [G, N / cells, C] through a channels-first map of the window."""
    x = g.reshape(g.transpose(q, 0, 2, 1), -1, CHANNELS, *window)
    x = g.op("AveragePool", x, kernel_shape=list(cell), strides=list(cell))
    return g.transpose(g.reshape(x, 0, CHANNELS, -1), 0, 2, 1)


def by_max_pool(g: Builder, q: str, window: tuple[int, int], cell: tuple[int, int]) -> str:
    x = g.transpose(g.reshape(q, -1, *window, CHANNELS), 0, 3, 1, 2)
    x = g.transpose(g.op("MaxPool", x, kernel_shape=list(cell), strides=list(cell)), 0, 2, 3, 1)
    rows = (window[0] // cell[0]) * (window[1] // cell[1])
    return g.reshape(x, -1, rows, CHANNELS)


def reduced(op: str, *, keepdims: int) -> Pool:
    """[G, h, a, w, b, C] reduced over a and b."""

    def write(g: Builder, q: str, window: tuple[int, int], cell: tuple[int, int]) -> str:
        sides = [(w // c, c) for w, c in zip(window, cell, strict=True)]
        x = g.reshape(q, -1, *sides[0], *sides[1], CHANNELS)
        x = g.op(op, x, axes=[2, 4], keepdims=keepdims)
        return g.reshape(x, -1, sides[0][0] * sides[1][0], CHANNELS)

    return write


def one_axis_after_the_other(g: Builder, q: str, window: tuple[int, int], cell: tuple[int, int]) -> str:
    """A maximum over the columns of a cell, then over its rows."""
    x = g.reshape(q, -1, window[0] // cell[0], cell[0], window[1] // cell[1], cell[1], CHANNELS)
    x = g.op("ReduceMax", x, axes=[4], keepdims=0)
    x = g.op("ReduceMax", x, axes=[2], keepdims=1)
    return g.reshape(x, -1, (window[0] // cell[0]) * (window[1] // cell[1]), CHANNELS)


def global_average(g: Builder, q: str, window: tuple[int, int], cell: tuple[int, int]) -> str:
    """One query for every window."""
    x = g.op("GlobalAveragePool", g.reshape(g.transpose(q, 0, 2, 1), -1, CHANNELS, *window))
    return g.reshape(x, -1, 1, CHANNELS)


def overlapping(g: Builder, q: str, window: tuple[int, int], cell: tuple[int, int]) -> str:
    x = g.reshape(g.transpose(q, 0, 2, 1), -1, CHANNELS, *window)
    x = g.op("MaxPool", x, kernel_shape=[3, 3], strides=list(cell), pads=[0, 0, 1, 1])
    return g.transpose(g.reshape(x, 0, CHANNELS, -1), 0, 2, 1)


def merge_single_tokens(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    """Windows of one token are the map already."""
    return g.reshape(tokens, -1, *geometry.feature_size, channels)


PLAIN = WindowGeometry((8, 12), (4, 4), (0, 0))


@dataclass(frozen=True)
class Case:
    """Attention in windows with queries pooled inside their window, `[B, H, W, C] -> [B, H/a, W/b, C]`; or, if keys,
    with keys and values pooled there, `[B, H, W, C]` to the same.
    """

    pool: Pool
    geometry: WindowGeometry = PLAIN
    cell: tuple[int, int] = (2, 2)
    batch: int | str = "batch"
    merge: movement.Move = movement.merge_by_reshape
    keys: bool = False

    @property
    def pooled(self) -> WindowGeometry:
        """The windows of the pooled map."""
        sizes = (self.geometry.feature_size, self.geometry.window_size, self.geometry.shift_size)
        return WindowGeometry(*(tuple(s // c for s, c in zip(size, self.cell, strict=True)) for size in sizes))

    def model(self) -> onnx.ModelProto:
        g = Builder()
        x = g.input("x", [self.batch, *self.geometry.feature_size, CHANNELS])
        tokens = movement.Movement().enter(g, x, self.geometry, CHANNELS)
        q, k, v = g.split(g.linear(tokens, QKV, QKV_BIAS), [CHANNELS] * 3, 2)
        window = self.geometry.window_size
        if self.keys:
            k, v = (self.pool(g, t, window, self.cell) for t in (k, v))
        else:
            q = self.pool(g, q, window, self.cell)
        q, k, v = (g.transpose(g.reshape(t, 0, -1, HEADS, CHANNELS // HEADS), 0, 2, 1, 3) for t in (q, k, v))
        logits = g.mul(g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), 0.7)
        out = g.op("MatMul", g.op("Softmax", logits, axis=-1), v)
        asked = self.geometry if self.keys else self.pooled
        out = g.reshape(g.transpose(out, 0, 2, 1, 3), -1, asked.tokens_per_window, CHANNELS)
        return g.model({"y": movement.Movement(merge=self.merge).leave(g, out, asked, CHANNELS)})

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        shape = (batch, *self.geometry.feature_size, CHANNELS)
        return {"x": np.random.default_rng(batch).normal(size=shape).astype(np.float32)}


SHIFTED = WindowGeometry((8, 12), (4, 4), (2, 2))
# 6 x 10 pixels, padded to 8 x 12: whole cells of padding
PADDED = WindowGeometry((6, 10), (4, 4), (0, 0))
POOLED = {
    "average-pool": Case(by_average_pool),
    "max-pool": Case(by_max_pool),
    "max": Case(reduced("ReduceMax", keepdims=0)),
    "mean": Case(reduced("ReduceMean", keepdims=1)),
    "min-kept-axes": Case(reduced("ReduceMin", keepdims=1)),
    "oblong-cells": Case(by_max_pool, WindowGeometry((8, 12), (4, 6), (0, 0)), (2, 3)),
    "cells-of-one-row": Case(by_average_pool, cell=(1, 4)),
    "global": Case(global_average, cell=(4, 4), merge=merge_single_tokens),
    "shifted-by-whole-cells": Case(by_average_pool, SHIFTED),
    "padded": Case(by_max_pool, PADDED),
    "static-batch": Case(by_average_pool, SHIFTED, batch=2),
    "one-image": Case(by_max_pool, batch=1),
    "rows-then-columns": Case(one_axis_after_the_other),
    "rows-alone-of-two-axes": Case(one_axis_after_the_other, cell=(2, 1)),
    "windows-of-a-row": Case(by_average_pool, cell=(4, 2)),
    "keys": Case(by_average_pool, keys=True),
    "keys-shifted": Case(reduced("ReduceMax", keepdims=0), SHIFTED, keys=True),
    "keys-rows-then-columns": Case(one_axis_after_the_other, keys=True),
}


@pytest.mark.parametrize("name", POOLED)
def test_tokens_pooled_in_their_window_are_pooled_on_the_map(name: str) -> None:
    case = POOLED[name]
    outcome = optimize(case.model())
    (site,) = outcome.sites
    assert site.verdict == "rewrite", site.reason
    assert not left_over(outcome.graph)
    (node,) = local_ops(outcome.graph)
    spec = spec_of(node)
    assert isinstance(spec, FlashWindowAttention)
    queries, keys = (case.geometry, case.pooled) if case.keys else (case.pooled, case.geometry)
    assert np.array_equal(spec.geometry.pixels(), queries.pixels())
    assert np.array_equal(spec.geometry.key_pixels(), keys.pixels())
    (check,) = verify_exact(read(case.model()), read(written(outcome)))
    assert check.passed, check.detail
    for batch in (1, 3) if isinstance(case.batch, str) else (case.batch,):
        inputs = case.inputs(batch)
        expected = run(case.model(), inputs)["y"]
        assert error(run(written(outcome), inputs)["y"], expected) <= TOLERANCE


@pytest.mark.parametrize("pool", [by_max_pool, one_axis_after_the_other])
def test_cells_of_padding_take_part_as_keys(pool: Pool) -> None:
    """They hold what the layers make of zero, so the pool is one of the padded map."""
    case = Case(pool, PADDED, keys=True)
    outcome = optimize(case.model())
    (site,) = outcome.sites
    assert (site.verdict, site.feature_size, site.key_size) == ("rewrite", (6, 10), (4, 6)), site.reason
    inputs = case.inputs(2)
    assert error(run(written(outcome), inputs)["y"], run(case.model(), inputs)["y"]) <= TOLERANCE


def merge_columns_first(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(tokens, -1, columns, rows, height, width, channels), 0, 2, 3, 1, 4, 5)
    return g.reshape(x, -1, *geometry.padded_size, channels)


MADE_INSIDE = "makes the queries inside each window"
NOT_POOLED = {
    "overlapping-kernels": (Case(overlapping), MADE_INSIDE),
    "cells-cut-by-the-shift": (Case(by_max_pool, WindowGeometry((8, 12), (4, 4), (1, 1))), MADE_INSIDE),
    "put-back-elsewhere": (Case(by_max_pool, merge=merge_columns_first), MADE_INSIDE),
}


@pytest.mark.parametrize("name", NOT_POOLED)
def test_pools_that_are_none_of_the_map_stay_where_they_are(name: str) -> None:
    case, reason = NOT_POOLED[name]
    outcome = optimize(case.model())
    (site,) = outcome.sites
    assert (site.verdict, reason in site.reason) == ("leave", True), site.reason
    assert not outcome.modified


def in_token_order(residual: bool) -> onnx.ModelProto:
    """Hiera's mask units, `[B, 96, C] -> [B, 24, C]`: 6 windows of 16 tokens that only the order of the tokens makes,
    the window's number last; the four tokens of a cell are 24 apart. residual: the pooled tokens are added to it.
    """
    g = Builder()
    x = g.input("x", ["batch", 96, CHANNELS])
    qkv = g.reshape(g.linear(x, QKV, QKV_BIAS), 0, 16, 6, 3, HEADS, CHANNELS // HEADS)
    q, k, v = (g.squeeze(t, 0) for t in g.split(g.transpose(qkv, 3, 0, 4, 2, 1, 5), [1, 1, 1], 0))
    q = g.op("ReduceMax", g.reshape(q, -1, HEADS, 6, 4, 4, CHANNELS // HEADS), axes=[3], keepdims=0)
    weights = g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 1, 2, 4, 3)), axis=-1)
    out = g.reshape(g.transpose(g.op("MatMul", weights, v), 0, 3, 2, 1, 4), -1, 24, CHANNELS)
    if residual:
        out = g.op("Add", out, g.op("ReduceMax", g.reshape(x, -1, 4, 24, CHANNELS), axes=[1], keepdims=0))
    return g.model({"y": out})


@pytest.mark.parametrize("residual", [False, True])
def test_windows_of_token_order_are_pooled_in_that_order(residual: bool) -> None:
    model = in_token_order(residual)
    outcome = optimize(model)
    (site,) = outcome.sites
    assert site.verdict == "rewrite", site.reason
    assert (site.key_size, site.key_window_size) == ((16, 6), (16, 1))
    assert not left_over(outcome.graph)
    inputs = {"x": np.random.default_rng(1).normal(size=(3, 96, CHANNELS)).astype(np.float32)}
    assert error(run(written(outcome), inputs)["y"], run(model, inputs)["y"]) <= TOLERANCE


def agents(cell: tuple[int, int], height: int = 8) -> onnx.ModelProto:
    """Agent attention in windows of 4 x 4: means of the queries gather from the window, its queries read the means. A
    map of fewer than 8 rows is padded.
    """
    geometry = WindowGeometry((height, 12), (4, 4), (0, 0))
    g = Builder()
    x = g.input("x", ["batch", height, 12, CHANNELS])
    tokens = movement.Movement().enter(g, x, geometry, CHANNELS)
    q, k, v = g.split(g.linear(tokens, QKV, QKV_BIAS), [CHANNELS] * 3, 2)

    def attend(q: str, k: str, v: str) -> str:
        q, k, v = (g.transpose(g.reshape(t, 0, -1, HEADS, CHANNELS // HEADS), 0, 2, 1, 3) for t in (q, k, v))
        weights = g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), axis=-1)
        return g.reshape(g.transpose(g.op("MatMul", weights, v), 0, 2, 1, 3), 0, -1, CHANNELS)

    mean = by_average_pool(g, q, (4, 4), cell)
    out = attend(q, mean, attend(mean, k, v))
    return g.model({"y": movement.Movement().leave(g, out, geometry, CHANNELS)})


@pytest.mark.parametrize("height", [8, 6, 5], ids=["whole", "cells-of-padding", "cells-cut-by-the-edge"])
def test_agents_of_a_window_are_pixels_of_a_smaller_map(height: int) -> None:
    """Agents of a padded map are means of the padded map: as keys those of padding take part."""
    model = agents((2, 2), height)
    outcome = optimize(model)
    assert [s.verdict for s in outcome.sites] == ["rewrite"] * 2, [s.reason for s in outcome.sites]
    assert [s.window_size for s in outcome.sites] == [(2, 2), (4, 4)]
    assert [s.key_window_size for s in outcome.sites] == [(4, 4), (2, 2)]
    assert not left_over(outcome.graph)
    checks = verify_exact(read(model), read(written(outcome)))
    assert [c.detail for c in checks] == ["the integer maps are equal"] * 2
    for batch in (1, 3):
        inputs = {"x": np.random.default_rng(batch).normal(size=(batch, height, 12, CHANNELS)).astype(np.float32)}
        assert error(run(written(outcome), inputs)["y"], run(model, inputs)["y"]) <= TOLERANCE
