"""Attention over channels is told as such, however many axes its pixels have and whatever made its queries."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models.onnx_builder import Builder
from tests.passes.rewritten import optimize

HEADS, DIM, HEIGHT, WIDTH = 2, 6, 5, 7
PIXELS = HEIGHT * WIDTH


def of_convolutions(g: Builder, groups: int, kernel: int) -> list[str]:
    """Query, key and value of an image, each [B, DIM, HEIGHT, WIDTH]."""
    x = g.input("x", ["batch", DIM, HEIGHT, WIDTH])
    weights = np.random.default_rng(0).normal(size=(3, DIM, DIM // groups, kernel, kernel))
    pads = [kernel // 2] * 4
    return [g.op("Conv", x, g.constant(w), kernel_shape=[kernel] * 2, pads=pads, group=groups) for w in weights]


def attended(g: Builder, maps: list[str], heads: int, back: tuple[int, ...]) -> str:
    """softmax(q k^T) v among the channels of each head, on [B, heads, channels, pixels], and back to an image."""
    query, key, value = (g.reshape(v, 0, heads, DIM // heads, PIXELS) for v in maps)
    logits = g.op("MatMul", query, g.transpose(key, 0, 1, 3, 2))
    scaled = g.op("Mul", logits, g.constant(np.random.default_rng(1).normal(size=(heads, 1, 1))))
    return g.reshape(g.op("MatMul", g.op("Softmax", scaled, axis=-1), value), *back)


@pytest.mark.parametrize("back", [(0, DIM, HEIGHT, WIDTH), (0, DIM, PIXELS)], ids=["image", "tokens"])
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize(("groups", "kernel"), [(1, 1), (1, 3), (DIM, 3)], ids=["linear", "3x3", "depthwise"])
def test_channel_attention_is_told(groups: int, kernel: int, heads: int, back: tuple[int, ...]) -> None:
    g = Builder()
    (site,) = optimize(g.model({"y": attended(g, of_convolutions(g, groups, kernel), heads, back)})).sites
    assert (site.kind, site.verdict) == ("channel", "leave")
    assert site.reason == "channel attention: the logits sum over the tokens, the softmax runs over channels"


@pytest.mark.parametrize("kernel", [1, 3])
def test_attention_among_pixels_of_the_same_layout_is_not_channel_attention(kernel: int) -> None:
    """q^T k in place of q k^T: each pixel attends all."""
    g = Builder()
    query, key, value = (g.reshape(v, 0, DIM, PIXELS) for v in of_convolutions(g, 1, kernel))
    logits = g.op("MatMul", g.transpose(query, 0, 2, 1), key)
    out = g.op("MatMul", g.op("Softmax", logits, axis=-1), g.transpose(value, 0, 2, 1))
    (site,) = optimize(g.model({"y": g.reshape(g.transpose(out, 0, 2, 1), 0, DIM, HEIGHT, WIDTH)})).sites
    assert (site.kind, site.verdict) == ("global", "leave")
