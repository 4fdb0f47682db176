"""Heads of one softmax that read windows of their own: left, and the first such head named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from attnrewrite.localattention.geometry import WindowGeometry
from tests.models import onnx_movement as movement
from tests.models.onnx_builder import Builder
from tests.passes.rewritten import optimize

HEADS, HEAD_DIM = 4, 3
CHANNELS = HEADS * HEAD_DIM
SIZE, WINDOW = (8, 12), (4, 4)
QKV = np.random.default_rng(0).normal(size=(CHANNELS, 3 * CHANNELS))


def model(shifts: dict[int, tuple[int, int]]) -> onnx.ModelProto:
    """Attention in windows, the heads in groups: {heads: their shift}, all in one softmax."""
    g = Builder()
    x = g.input("x", ["batch", *SIZE, CHANNELS])
    parts = g.split(g.reshape(g.matmul(x, QKV), 0, *SIZE, 3, CHANNELS), [n * HEAD_DIM for n in shifts], 4)
    windows = []
    for part, (heads, shift) in zip(parts, shifts.items(), strict=True):
        geometry, width = WindowGeometry(SIZE, WINDOW, shift), 3 * heads * HEAD_DIM
        tokens = movement.Movement().enter(g, g.reshape(part, 0, *SIZE, width), geometry, width)
        windows.append(g.transpose(g.reshape(tokens, -1, 16, 3, heads, HEAD_DIM), 2, 0, 3, 1, 4))
    q, k, v = (g.squeeze(t, 0) for t in g.split(g.concat(windows, 2), [1, 1, 1], 0))
    out = g.op("MatMul", g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), axis=-1), v)
    groups = g.split(out, list(shifts), 1)
    merged = []
    for group, (heads, shift) in zip(groups, shifts.items(), strict=True):
        width = heads * HEAD_DIM
        tokens = g.reshape(g.transpose(group, 0, 2, 1, 3), -1, 16, width)
        merged.append(movement.Movement().leave(g, tokens, WindowGeometry(SIZE, WINDOW, shift), width))
    return g.model({"y": g.concat(merged, 3)})


@pytest.mark.parametrize(
    ("shifts", "reason"),
    [
        ({1: (0, 0), 3: (2, 2)}, "head 1 reads other pixels than head 0"),
        ({3: (2, 2), 1: (0, 2)}, "head 3 reads other pixels than head 2"),
    ],
)
def test_heads_with_shifts_of_their_own_are_left(shifts: dict[int, tuple[int, int]], reason: str) -> None:
    outcome = optimize(model(shifts))
    (site,) = outcome.sites
    assert (site.verdict, site.reason) == ("leave", reason)
    assert not outcome.modified


def test_heads_in_groups_with_one_shift_are_rewritten() -> None:
    outcome = optimize(model({1: (2, 2), 3: (2, 2)}))
    (site,) = outcome.sites
    assert site.verdict == "rewrite", site.reason
    assert site.shift_size == (2, 2)
