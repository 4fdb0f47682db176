"""Heads that only what lies behind the attention tells.

Folded into a symbolic batch, in a view that the output undoes after more axes were merged (HaloNet); or with operands
that are normalised head by head, so that no operator before the attention joins them with the channels (MViT).
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.models.onnx_builder import Builder
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

HEADS, DIM, HEIGHT, WIDTH, WINDOW = 3, 5, 8, 12, 4
CHANNELS, ROWS, COLUMNS = HEADS * DIM, HEIGHT // WINDOW, WIDTH // WINDOW
TOKENS, WINDOWS = WINDOW * WINDOW, ROWS * COLUMNS
TOLERANCE = 5e-6  # as in test_spellings


def model(order: tuple[int, ...]) -> onnx.ModelProto:
    """Window attention on [batch, C, H, W]. order: the axes (3 * batch * d, i, j, row, column) of the attention's
    output as they return; [0, 3, 1, 4, 2] is the map.
    """
    g = Builder()
    x = g.input("x", ["batch", CHANNELS, HEIGHT, WIDTH])
    rng = np.random.default_rng(5)

    def windows(kernel: np.ndarray) -> str:
        """[3 * batch, nW, N, d] of a projection of the map."""
        projected = g.op("Conv", x, g.constant(kernel))
        view = g.reshape(projected, -1, DIM, ROWS, WINDOW, COLUMNS, WINDOW)
        tokens = g.reshape(g.transpose(view, 0, 1, 3, 5, 2, 4), -1, DIM, TOKENS, WINDOWS)
        return g.transpose(tokens, 0, 3, 2, 1)

    q, k, v = (windows(rng.normal(size=(CHANNELS, CHANNELS, 1, 1)) / CHANNELS**0.5) for _ in range(3))
    weights = g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), axis=-1)
    out = g.transpose(g.op("MatMul", weights, v), 0, 3, 2, 1)  # [3 * batch, d, N, nW]
    out = g.transpose(g.reshape(out, -1, WINDOW, WINDOW, ROWS, COLUMNS), *order)  # the channels join the batch
    return g.model({"y": g.reshape(out, -1, CHANNELS, HEIGHT, WIDTH)})


@pytest.mark.parametrize("batch", [1, 2])
def test_the_folded_heads_are_found(batch: int) -> None:
    original = model((0, 3, 1, 4, 2))
    outcome = optimize(original)
    (site,) = outcome.sites
    assert (site.verdict, site.kind, site.num_heads, site.window_size) == ("rewrite", "window", HEADS, (WINDOW, WINDOW))
    assert len(local_ops(outcome.graph)) == 1
    assert not left_over(outcome.graph)
    x = np.random.default_rng(batch).normal(size=(batch, CHANNELS, HEIGHT, WIDTH)).astype(np.float32)
    assert error(run(written(outcome), {"x": x})["y"], run(original, {"x": x})["y"]) <= TOLERANCE


def test_rows_and_columns_exchanged_on_the_way_back_are_left() -> None:
    outcome = optimize(model((0, 1, 3, 4, 2)))
    (site,) = outcome.sites
    assert (site.verdict, outcome.modified) == ("leave", False)
    assert site.reason == "the output does not return to the pixels its queries came from"


def test_heads_normalised_one_by_one_are_no_windows() -> None:
    """softmax(norm(q) norm(k)^T) norm(v) + norm(q) over all tokens of [batch, nH, N, d]: nothing is local."""
    g = Builder()
    x = g.input("x", ["batch", TOKENS, CHANNELS])
    rng = np.random.default_rng(6)

    def head_by_head() -> str:
        view = g.reshape(g.matmul(x, rng.normal(size=(CHANNELS, CHANNELS))), -1, TOKENS, HEADS, DIM)
        weight, bias = g.constant(np.ones(DIM)), g.constant(np.zeros(DIM))
        return g.op("LayerNormalization", g.transpose(view, 0, 2, 1, 3), weight, bias, axis=-1)

    q, k, v = (head_by_head() for _ in range(3))
    weights = g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), axis=-1)
    pooled = g.op("Add", g.op("MatMul", weights, v), q)
    out = g.matmul(
        g.reshape(g.transpose(pooled, 0, 2, 1, 3), -1, TOKENS, CHANNELS), rng.normal(size=(CHANNELS, CHANNELS))
    )
    outcome = optimize(g.model({"y": out}))
    (site,) = outcome.sites
    assert (site.verdict, site.kind) == ("leave", "global")
    assert site.reason == "global attention: each of the 16 queries attends the same 16 keys"
