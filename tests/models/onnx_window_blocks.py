"""Window attention written whole in structures that no combination of parts gives.

Each function returns the model of `x + proj(attention)` on `[2, 8, 12, C]`, windows of 4 x 4, with relative position
bias; what they compute is what the plain or shifted `WindowSpelling` computes. Letters as in onnx_windows.
"""

from __future__ import annotations

import numpy as np
import onnx

from tests.models.onnx_builder import Builder
from tests.models.onnx_movement import merge_by_reshape, partition_by_reshape, roll_by_slices
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, PLAIN, SHIFTED, Weights, bias_of

BATCH = 2
SCALE = HEAD_DIM**-0.5


def _input(g: Builder) -> str:
    return g.input("x", [BATCH, 8, 12, CHANNELS])


def _finish(g: Builder, x: str, merged: str) -> onnx.ModelProto:
    """Projection on the merged map, and the residual."""
    weights = Weights.of(PLAIN)
    return g.model({"y": g.op("Add", x, g.linear(merged, weights.proj, weights.proj_bias))})


def windows_as_axes() -> onnx.ModelProto:
    """The grid of windows stays two axes: q, k, v `[B, rows, columns, nH, N, d]`, six axes in the logits too."""
    g, weights = Builder(), Weights.of(PLAIN)
    x = _input(g)
    qkv = g.reshape(g.linear(x, weights.qkv, weights.qkv_bias), BATCH, 2, 4, 3, 4, 3 * CHANNELS)
    qkv = g.reshape(g.transpose(qkv, 0, 1, 3, 2, 4, 5), BATCH, 2, 3, 16, 3, HEADS, HEAD_DIM)
    q, k, v = (g.gather(g.transpose(qkv, 4, 0, 1, 2, 5, 3, 6), i, 0) for i in range(3))
    logits = g.op("MatMul", g.mul(q, SCALE), g.transpose(k, 0, 1, 2, 3, 5, 4))
    weighted = g.op("MatMul", g.op("Softmax", g.add(logits, bias_of(PLAIN)), axis=-1), v)
    tokens = g.reshape(g.transpose(weighted, 0, 1, 2, 4, 3, 5), BATCH, 2, 3, 4, 4, CHANNELS)
    return _finish(g, x, g.reshape(g.transpose(tokens, 0, 1, 3, 2, 4, 5), BATCH, 8, 12, CHANNELS))


def one_transpose_each() -> onnx.ModelProto:
    """einops: partition and heads in one permute of eight axes, and back in one."""
    g, weights = Builder(), Weights.of(PLAIN)
    x = _input(g)
    parts = []
    for i in range(3):
        part = g.reshape(g.linear(x, *weights.part(i)), BATCH, 2, 4, 3, 4, HEADS, HEAD_DIM)
        parts.append(g.reshape(g.transpose(part, 0, 1, 3, 5, 2, 4, 6), BATCH * 6 * HEADS, 16, HEAD_DIM))
    q, k, v = parts
    logits = g.mul(g.op("Einsum", q, k, equation="b i d, b j d -> b i j"), SCALE)
    logits = g.add(logits, np.tile(bias_of(PLAIN)[0], (BATCH * 6, 1, 1)))
    weighted = g.op("Einsum", g.op("Softmax", logits, axis=-1), v, equation="b i j, b j d -> b i d")
    back = g.transpose(g.reshape(weighted, BATCH, 2, 3, HEADS, 4, 4, HEAD_DIM), 0, 1, 4, 2, 5, 3, 6)
    return _finish(g, x, g.reshape(back, BATCH, 8, 12, CHANNELS))


def windows_before_batch() -> onnx.ModelProto:
    """The window number is the outer part of the batch axis: groups run over windows first, then samples."""
    g, weights = Builder(), Weights.of(PLAIN)
    x = _input(g)
    windows = g.transpose(g.reshape(x, BATCH, 2, 4, 3, 4, CHANNELS), 1, 3, 0, 2, 4, 5)
    q, k, v = _heads(g, g.reshape(windows, 6 * BATCH, 16, CHANNELS), weights)
    logits = g.add(g.op("MatMul", g.mul(q, SCALE), g.transpose(k, 0, 1, 3, 2)), bias_of(PLAIN))
    weighted = g.op("MatMul", g.op("Softmax", logits, axis=-1), v)
    tokens = g.reshape(g.transpose(weighted, 0, 2, 1, 3), 2, 3, BATCH, 4, 4, CHANNELS)
    return _finish(g, x, g.reshape(g.transpose(tokens, 2, 0, 3, 1, 4, 5), BATCH, 8, 12, CHANNELS))


def tokens_in_and_out() -> onnx.ModelProto:
    """The residual stream is `[B, H*W, C]`, as in the Swin reference and SwinIR; shifted."""
    g, weights = Builder(), Weights.of(SHIFTED)
    stream = g.input("x", [BATCH, 96, CHANNELS])
    x = roll_by_slices(g, g.reshape(stream, BATCH, 8, 12, CHANNELS), (2, 2), (1, 2), (8, 12))
    q, k, v = _heads(g, partition_by_reshape(g, x, SHIFTED, CHANNELS), weights)
    logits = g.add(g.op("MatMul", g.mul(q, SCALE), g.transpose(k, 0, 1, 3, 2)), bias_of(SHIFTED))
    logits = g.add(g.reshape(logits, BATCH, 6, HEADS, 16, 16), _penalty()[None, :, None])
    weighted = g.op("MatMul", g.op("Softmax", g.reshape(logits, -1, HEADS, 16, 16), axis=-1), v)
    tokens = g.reshape(g.transpose(weighted, 0, 2, 1, 3), -1, 16, CHANNELS)
    tokens = g.linear(tokens, weights.proj, weights.proj_bias)
    merged = roll_by_slices(g, merge_by_reshape(g, tokens, SHIFTED, CHANNELS), (-2, -2), (1, 2), (8, 12))
    return g.model({"y": g.op("Add", stream, g.reshape(merged, BATCH, 96, CHANNELS))})


def bias_and_mask_in_one() -> onnx.ModelProto:
    """Bias and shift mask summed beforehand into one constant `[1, nW, nH, N, N]`."""
    g, weights = Builder(), Weights.of(SHIFTED)
    x = _input(g)
    rolled = roll_by_slices(g, x, (2, 2), (1, 2), (8, 12))
    q, k, v = _heads(g, partition_by_reshape(g, rolled, SHIFTED, CHANNELS), weights)
    logits = g.op("MatMul", g.mul(q, SCALE), g.transpose(k, 0, 1, 3, 2))
    logits = g.add(g.reshape(logits, BATCH, 6, HEADS, 16, 16), (bias_of(SHIFTED) + _penalty()[:, None])[None])
    weighted = g.op("MatMul", g.op("Softmax", g.reshape(logits, -1, HEADS, 16, 16), axis=-1), v)
    tokens = g.reshape(g.transpose(weighted, 0, 2, 1, 3), -1, 16, CHANNELS)
    merged = merge_by_reshape(g, tokens, SHIFTED, CHANNELS)
    return _finish(g, x, roll_by_slices(g, merged, (-2, -2), (1, 2), (8, 12)))


def head_by_head() -> onnx.ModelProto:
    """One attention per head, each with its own softmax, the results concatenated: three sites of one head."""
    g, weights = Builder(), Weights.of(PLAIN)
    x = _input(g)
    tokens = partition_by_reshape(g, x, PLAIN, CHANNELS)
    parts = [g.split(g.linear(tokens, *weights.part(i)), [HEAD_DIM] * HEADS, 2) for i in range(3)]
    heads = []
    for h, (q, k, v) in enumerate(zip(*parts, strict=True)):
        logits = g.add(g.op("MatMul", g.mul(q, SCALE), g.transpose(k, 0, 2, 1)), bias_of(PLAIN)[:, h])
        heads.append(g.op("MatMul", g.op("Softmax", logits, axis=-1), v))
    return _finish(g, x, merge_by_reshape(g, g.concat(heads, 2), PLAIN, CHANNELS))


def softmax_written_out() -> onnx.ModelProto:
    """exp(logits - logsumexp(logits)), with no Softmax node."""
    g, weights = Builder(), Weights.of(PLAIN)
    x = _input(g)
    q, k, v = _heads(g, partition_by_reshape(g, x, PLAIN, CHANNELS), weights)
    logits = g.add(g.op("MatMul", g.mul(q, SCALE), g.transpose(k, 0, 1, 3, 2)), bias_of(PLAIN))
    norm = g.op("ReduceLogSumExp", logits, axes=[-1], keepdims=1)
    weighted = g.op("MatMul", g.op("Exp", g.op("Sub", logits, norm)), v)
    tokens = g.reshape(g.transpose(weighted, 0, 2, 1, 3), -1, 16, CHANNELS)
    return _finish(g, x, merge_by_reshape(g, tokens, PLAIN, CHANNELS))


def keys_in_another_order() -> onnx.ModelProto:
    """Key and value tokens, and with them the columns of the bias, permuted alike within every window."""
    g, weights = Builder(), Weights.of(PLAIN)
    order = np.random.default_rng(2).permutation(16)
    x = _input(g)
    q, k, v = _heads(g, partition_by_reshape(g, x, PLAIN, CHANNELS), weights)
    k, v = g.gather(k, order, 2), g.gather(v, order, 2)
    logits = g.op("MatMul", g.mul(q, SCALE), g.transpose(k, 0, 1, 3, 2))
    weighted = g.op("MatMul", g.op("Softmax", g.add(logits, bias_of(PLAIN)[..., order]), axis=-1), v)
    tokens = g.reshape(g.transpose(weighted, 0, 2, 1, 3), -1, 16, CHANNELS)
    return _finish(g, x, merge_by_reshape(g, tokens, PLAIN, CHANNELS))


def _heads(g: Builder, tokens: str, weights: Weights) -> tuple[str, str, str]:
    """One packed Linear; q, k, v `[G, nH, 16, d]`."""
    packed = g.reshape(g.linear(tokens, weights.qkv, weights.qkv_bias), -1, 16, 3, HEADS, HEAD_DIM)
    stacked = g.transpose(packed, 2, 0, 3, 1, 4)
    return (g.gather(stacked, 0, 0), g.gather(stacked, 1, 0), g.gather(stacked, 2, 0))


def _penalty() -> np.ndarray:
    return np.where(SHIFTED.crosses_regions(), -100.0, 0.0)
