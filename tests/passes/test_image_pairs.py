"""Two images of one batch whose windows attend each other's (GMFlow, UniMatch): the exchange moves nothing on a map."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from tests.models.onnx_builder import Builder
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

HEIGHT, WIDTH, WINDOW, CHANNELS = 8, 12, 4, 6
ROWS, COLUMNS, TOKENS = HEIGHT // WINDOW, WIDTH // WINDOW, WINDOW * WINDOW
SHAPE = (2, HEIGHT, WIDTH, CHANNELS)
TOLERANCE = 5e-6  # as in test_spellings

Exchange = Callable[[Builder, str], str]


def images(g: Builder, x: str) -> str:
    """The other image of the pair."""
    return g.concat([g.slice(x, 1, 2, 0), g.slice(x, 0, 1, 0)], 0)


def halves_of_the_map(g: Builder, x: str) -> str:
    """The other image, its left and right half exchanged as well."""
    other = images(g, x)
    return g.concat([g.slice(other, WIDTH // 2, WIDTH, 2), g.slice(other, 0, WIDTH // 2, 2)], 2)


def model(exchange: Exchange) -> onnx.ModelProto:
    """Window attention of x [2, H, W, C]; keys and values are those of exchange(x)."""
    g = Builder()
    x = g.input("x", SHAPE)
    rng = np.random.default_rng(8)

    def windows(tokens: str) -> str:
        projected = g.matmul(tokens, rng.normal(size=(CHANNELS, CHANNELS)) / CHANNELS**0.5)
        view = g.reshape(projected, 2, ROWS, WINDOW, COLUMNS, WINDOW, CHANNELS)
        return g.reshape(g.transpose(view, 0, 1, 3, 2, 4, 5), -1, TOKENS, CHANNELS)

    other = exchange(g, x)
    q, k, v = windows(x), windows(other), windows(other)
    weights = g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 2, 1)), axis=-1)
    out = g.reshape(g.op("MatMul", weights, v), 2, ROWS, COLUMNS, WINDOW, WINDOW, CHANNELS)
    return g.model({"y": g.reshape(g.transpose(out, 0, 1, 3, 2, 4, 5), *SHAPE)})


def test_windows_of_another_image_are_rewritten() -> None:
    original = model(images)
    outcome = optimize(original)
    (site,) = outcome.sites
    assert (site.verdict, site.kind, site.window_size) == ("rewrite", "window", (WINDOW, WINDOW))
    assert len(local_ops(outcome.graph)) == 1
    assert left_over(outcome.graph) == ["concat2_0 rolls"]  # the exchange itself
    x = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    assert error(run(written(outcome), {"x": x})["y"], run(original, {"x": x})["y"]) <= TOLERANCE


def test_an_exchange_within_the_map_too_is_left() -> None:
    outcome = optimize(model(halves_of_the_map))
    (site,) = outcome.sites
    assert (site.verdict, outcome.modified) == ("leave", False)
    assert site.reason.startswith("the keys are not those of the queries' window")
