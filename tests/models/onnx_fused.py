"""Window attention in one operator: ONNX's Attention (opset 23), and what ONNX Runtime's optimisers write.

Each function returns the model of `x + proj(attention)` on `[2, 8, 12, C]`, windows of 4 x 4; what they compute is what
a `WindowSpelling` computes. Letters as in onnx_windows.
"""

from __future__ import annotations

import numpy as np
import onnx

from tests.models.onnx_builder import Builder
from tests.models.onnx_movement import merge_by_reshape, partition_by_reshape, roll_by_slices
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, PLAIN, SHIFTED, Weights, bias_of

BATCH = 2
ORT = "com.microsoft"


def _tokens(g: Builder) -> tuple[str, str]:
    """The map, and its windows `[B*nW, N, C]`."""
    x = g.input("x", [BATCH, 8, 12, CHANNELS])
    return x, partition_by_reshape(g, x, PLAIN, CHANNELS)


def _finish(g: Builder, x: str, tokens: str) -> onnx.ModelProto:
    """Merge, projection, residual."""
    weights = Weights.of(PLAIN)
    merged = merge_by_reshape(g, g.reshape(tokens, -1, 16, CHANNELS), PLAIN, CHANNELS)
    return g.model({"y": g.op("Add", x, g.linear(merged, weights.proj, weights.proj_bias))})


def _parts(g: Builder, tokens: str, *, biased: bool = True) -> list[str]:
    """Query, key and value `[B*nW, N, C]`."""
    linears = [Weights.of(PLAIN).part(i) for i in range(3)]
    return [g.linear(tokens, w, b) if biased else g.matmul(tokens, w) for w, b in linears]


def _heads(g: Builder, part: str) -> str:
    """`[B*nW, N, C] -> [B*nW, nH, N, d]`."""
    return g.transpose(g.reshape(part, -1, 16, HEADS, HEAD_DIM), 0, 2, 1, 3)


def standard_of_tokens() -> onnx.ModelProto:
    """Attention of `[G, N, C]`, its mask the relative position bias."""
    g = Builder(23)
    x, tokens = _tokens(g)
    attributes = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    return _finish(g, x, g.op("Attention", *_parts(g, tokens), g.constant(bias_of(PLAIN)), **attributes))


def standard_of_heads() -> onnx.ModelProto:
    """Attention of `[G, nH, N, d]`."""
    g = Builder(23)
    x, tokens = _tokens(g)
    query, key, value = (_heads(g, part) for part in _parts(g, tokens))
    attended = g.op("Attention", query, key, value, g.constant(bias_of(PLAIN)), scale=HEAD_DIM**-0.5)
    return _finish(g, x, g.transpose(attended, 0, 2, 1, 3))


def standard_causal() -> onnx.ModelProto:
    """Every token of a window attends itself and those before it."""
    g = Builder(23)
    x, tokens = _tokens(g)
    query, key, value = (_heads(g, part) for part in _parts(g, tokens))
    attended = g.op("Attention", query, key, value, is_causal=1)
    return _finish(g, x, g.transpose(attended, 0, 2, 1, 3))


def standard_with_boolean_mask() -> onnx.ModelProto:
    """Shifted windows; tokens of other regions are excluded."""
    g = Builder(23)
    x = g.input("x", [BATCH, 8, 12, CHANNELS])
    tokens = partition_by_reshape(g, roll_by_slices(g, x, (2, 2), (1, 2), (8, 12)), SHIFTED, CHANNELS)
    allowed = np.tile(~SHIFTED.crosses_regions()[:, None], (BATCH, 1, 1, 1))
    query, key, value = (_heads(g, part) for part in _parts(g, tokens))
    attended = g.transpose(g.op("Attention", query, key, value, g.constant(allowed)), 0, 2, 1, 3)
    merged = merge_by_reshape(g, g.reshape(attended, -1, 16, CHANNELS), SHIFTED, CHANNELS)
    weights = Weights.of(SHIFTED)
    back = roll_by_slices(g, g.linear(merged, weights.proj, weights.proj_bias), (-2, -2), (1, 2), (8, 12))
    return g.model({"y": g.op("Add", x, back)})


def packed_with_weights() -> onnx.ModelProto:
    """com.microsoft.Attention: the packed Linear and the attention in one."""
    g, weights = Builder(), Weights.of(PLAIN)
    x, tokens = _tokens(g)
    operands = [g.constant(weights.qkv), g.constant(weights.qkv_bias), "", "", g.constant(bias_of(PLAIN))]
    return _finish(g, x, g.op("Attention", tokens, *operands, domain=ORT, num_heads=HEADS))


def multi_head() -> onnx.ModelProto:
    """com.microsoft.MultiHeadAttention of three tensors, the biases of their Linears its own."""
    g, weights = Builder(), Weights.of(PLAIN)
    x, tokens = _tokens(g)
    operands = [*_parts(g, tokens, biased=False), g.constant(weights.qkv_bias), "", g.constant(bias_of(PLAIN))]
    return _finish(g, x, g.op("MultiHeadAttention", *operands, domain=ORT, num_heads=HEADS))


def multi_head_of_heads() -> onnx.ModelProto:
    """Key and value with their heads apart `[G, nH, N, d]`, a scale of its own."""
    g = Builder()
    x, tokens = _tokens(g)
    query, key, value = _parts(g, tokens)
    operands = [query, _heads(g, key), _heads(g, value), "", "", g.constant(bias_of(PLAIN))]
    attributes = {"num_heads": HEADS, "scale": HEAD_DIM**-0.5}
    return _finish(g, x, g.op("MultiHeadAttention", *operands, domain=ORT, **attributes))


def multi_head_packed() -> onnx.ModelProto:
    """Query, key and value in one `[G, N, nH, 3, d]`."""
    g, weights = Builder(), Weights.of(PLAIN)
    x, tokens = _tokens(g)
    order = np.arange(3 * CHANNELS).reshape(3, HEADS, HEAD_DIM).transpose(1, 0, 2).reshape(-1)
    packed = g.reshape(g.linear(tokens, weights.qkv[:, order], weights.qkv_bias[order]), -1, 16, HEADS, 3, HEAD_DIM)
    operands = [packed, "", "", "", "", g.constant(bias_of(PLAIN))]
    return _finish(g, x, g.op("MultiHeadAttention", *operands, domain=ORT, num_heads=HEADS))


def fused_products() -> onnx.ModelProto:
    """com.microsoft.FusedMatMul: the scale and the transpose of the key in the product."""
    g = Builder()
    x, tokens = _tokens(g)
    query, key, value = (_heads(g, part) for part in _parts(g, tokens))
    logits = g.op("FusedMatMul", query, key, domain=ORT, transB=1, alpha=HEAD_DIM**-0.5)
    weights = g.op("Softmax", g.add(logits, bias_of(PLAIN)), axis=-1)
    return _finish(g, x, g.transpose(g.op("FusedMatMul", weights, value, domain=ORT), 0, 2, 1, 3))
