"""Ways to write the arithmetic of window attention: heads, logits and scale, bias, mask, softmax, weighting of the
values.

Letters: G = B*nW groups, N tokens per window, nW windows, C channels, nH heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from tests.models.onnx_builder import Builder
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, Heads, Triple, WindowSpelling, bias_of, relative_index

# Query, key and value `[G, nH, N, d]` from tokens `[G, N, C]` (or `[G, N, 3C]` where the map was projected).


def packed(g: Builder, spelling: WindowSpelling, tokens: str, order: np.ndarray | None = None) -> str:
    """`[G, N, 3C]`, the columns of the Linear in the order given."""
    weights = spelling.weights
    if spelling.project == "map":
        return tokens
    order = np.arange(3 * CHANNELS) if order is None else order
    return g.linear(tokens, weights.qkv[:, order], weights.qkv_bias[order])


def _stacked(g: Builder, spelling: WindowSpelling, tokens: str) -> str:
    """`[3, G, nH, N, d]`: reshape and permute of one Linear."""
    size = spelling.geometry.tokens_per_window
    x = g.reshape(packed(g, spelling, tokens), -1, size, 3, HEADS, HEAD_DIM)
    return g.transpose(x, 2, 0, 3, 1, 4)


def heads_by_gather(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """qkv[0], qkv[1], qkv[2]."""
    x = _stacked(g, spelling, tokens)
    return (g.gather(x, 0, 0), g.gather(x, 1, 0), g.gather(x, 2, 0))


def heads_by_slices(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """unbind as the dynamo exporter writes it."""
    x = _stacked(g, spelling, tokens)
    q, k, v = (g.squeeze(g.slice(x, i, i + 1, 0), 0) for i in range(3))
    return q, k, v


def heads_by_split(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """unbind as the TorchScript exporter writes it."""
    q, k, v = (g.squeeze(part, 0) for part in g.split(_stacked(g, spelling, tokens), [1, 1, 1], 0))
    return q, k, v


def _to_heads(g: Builder, spelling: WindowSpelling, part: str) -> str:
    """`[G, N, C] -> [G, nH, N, d]`."""
    x = g.reshape(part, -1, spelling.geometry.tokens_per_window, HEADS, HEAD_DIM)
    return g.transpose(x, 0, 2, 1, 3)


def heads_by_chunk(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """The packed Linear split along its channels, then heads of each."""
    parts = g.split(packed(g, spelling, tokens), [CHANNELS] * 3, 2)
    q, k, v = (_to_heads(g, spelling, part) for part in parts)
    return q, k, v


def heads_separate(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """Three Linears."""
    q, k, v = (_to_heads(g, spelling, g.linear(tokens, *spelling.weights.part(i))) for i in range(3))
    return q, k, v


def heads_by_gemm(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """Gemm on two axes with a transposed weight: addmm."""
    size = spelling.geometry.tokens_per_window
    flat = g.reshape(tokens, -1, CHANNELS)
    parts = []
    for i in range(3):
        weight, bias = spelling.weights.part(i)
        part = g.op("Gemm", flat, g.constant(weight.T), g.constant(bias), transB=1)
        parts.append(g.transpose(g.reshape(part, -1, size, HEADS, HEAD_DIM), 0, 2, 1, 3))
    q, k, v = parts
    return q, k, v


def heads_interleaved(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """The Linear's columns ordered (head, q/k/v, d): the query, key and value of a head lie together."""
    order = np.arange(3 * CHANNELS).reshape(3, HEADS, HEAD_DIM).transpose(1, 0, 2).reshape(-1)
    x = g.reshape(packed(g, spelling, tokens, order), -1, spelling.geometry.tokens_per_window, HEADS, 3 * HEAD_DIM)
    q, k, v = g.split(g.transpose(x, 0, 2, 1, 3), [HEAD_DIM] * 3, 3)
    return q, k, v


def heads_last(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """The Linear's columns ordered (q/k/v, d, head): einops' "(k d h)"."""
    order = np.arange(3 * CHANNELS).reshape(3, HEADS, HEAD_DIM).transpose(0, 2, 1).reshape(-1)
    size = spelling.geometry.tokens_per_window
    x = g.reshape(packed(g, spelling, tokens, order), -1, size, 3, HEAD_DIM, HEADS)
    q, k, v = (g.gather(g.transpose(x, 2, 0, 4, 1, 3), i, 0) for i in range(3))
    return q, k, v


def after_pointwise(heads: Heads) -> Heads:
    """Each channel of the tokens passes through `2x - 1` and back before the Linear."""

    def write(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
        scaled = g.add(g.mul(tokens, np.full(CHANNELS, 2.0)), np.full(CHANNELS, -1.0))
        return heads(g, spelling, g.mul(g.add(scaled, np.float64(1.0)), np.float64(0.5)))

    return write


# Logits `[G, nH, N, N]` from query and key `[G, nH, N, d]`.


def logits_scaled_query(g: Builder, q: str, k: str, scale: float) -> str:
    return g.op("MatMul", g.mul(q, scale), g.transpose(k, 0, 1, 3, 2))


def logits_scaled_key(g: Builder, q: str, k: str, scale: float) -> str:
    return g.op("MatMul", q, g.transpose(g.mul(k, scale), 0, 1, 3, 2))


def logits_scaled(g: Builder, q: str, k: str, scale: float) -> str:
    return g.mul(g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), scale)


def logits_scale_first(g: Builder, q: str, k: str, scale: float) -> str:
    """The constant is the first operand."""
    return g.op("Mul", g.constant(scale), g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)))


def logits_divided(g: Builder, q: str, k: str, scale: float) -> str:
    return g.op("Div", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), g.constant(1.0 / scale))


def logits_divided_query(g: Builder, q: str, k: str, scale: float) -> str:
    return g.op("MatMul", g.op("Div", q, g.constant(1.0 / scale)), g.transpose(k, 0, 1, 3, 2))


def logits_square_roots(g: Builder, q: str, k: str, scale: float) -> str:
    """scaled_dot_product_attention as the exporters write it."""
    root = scale**0.5
    return g.op("MatMul", g.mul(q, root), g.mul(g.transpose(k, 0, 1, 3, 2), root))


def logits_unscaled(g: Builder, q: str, k: str, scale: float) -> str:
    return g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2))


def logits_einsum(g: Builder, q: str, k: str, scale: float) -> str:
    return g.mul(g.op("Einsum", q, k, equation="bhid,bhjd->bhij"), scale)


def logits_einsum_spaced(g: Builder, q: str, k: str, scale: float) -> str:
    """einops' letters, spaces, and the operands the other way round."""
    return g.mul(g.op("Einsum", k, q, equation="b h j d, b h i d -> b h i j"), scale)


def logits_sum(g: Builder, q: str, k: str, scale: float) -> str:
    """(q[..., :, None, :] * k[..., None, :, :]).sum(-1)."""
    return g.mul(g.reduce_sum(g.op("Mul", g.unsqueeze(q, 3), g.unsqueeze(k, 2)), 4), scale)


def logits_bmm(g: Builder, q: str, k: str, scale: float) -> str:
    """Heads folded into the batch: three axes (windows of 16 tokens)."""
    q3, k3 = g.reshape(g.mul(q, scale), -1, 16, HEAD_DIM), g.reshape(k, -1, 16, HEAD_DIM)
    logits = g.op("MatMul", q3, g.transpose(k3, 0, 2, 1))
    return g.reshape(logits, -1, HEADS, 16, 16)


def logits_transposed_twice(g: Builder, q: str, k: str, scale: float) -> str:
    """(k q^T)^T."""
    return g.transpose(g.op("MatMul", k, g.transpose(g.mul(q, scale), 0, 1, 3, 2)), 0, 1, 3, 2)


# Bias on logits `[G, nH, N, N]`.


def bias_constant(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    return g.add(logits, bias_of(spelling.geometry))


def bias_first(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """The bias is the first operand and has no batch axis."""
    return g.op("Add", g.constant(bias_of(spelling.geometry)[0]), logits)


def bias_gathered(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """table[index] in the graph: Gather, Reshape, Transpose, Unsqueeze."""
    size = spelling.geometry.tokens_per_window
    table = g.constant(spelling.weights.table)
    rows = g.op("Gather", table, g.constant(relative_index(spelling.geometry).reshape(-1)), axis=0)
    bias = g.unsqueeze(g.transpose(g.reshape(rows, size, size, HEADS), 2, 0, 1), 0)
    return g.op("Add", logits, bias)


def bias_subtracted(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """logits - (-bias)."""
    return g.op("Sub", logits, g.constant(-bias_of(spelling.geometry)))


# Mask on logits `[G, nH, N, N]`.


def _per_window(change: Callable[[Builder, str, WindowSpelling], str]) -> Callable[[Builder, str, WindowSpelling], str]:
    """Apply `change` to the logits seen as `[B, nW, nH, N, N]`."""

    def write(g: Builder, logits: str, spelling: WindowSpelling) -> str:
        size, windows = spelling.geometry.tokens_per_window, spelling.geometry.num_windows
        masked = change(g, g.reshape(logits, -1, windows, HEADS, size, size), spelling)
        return g.reshape(masked, -1, HEADS, size, size)

    return write


def shift_mask(spelling: WindowSpelling) -> np.ndarray:
    mask = spelling.added_mask
    assert mask is not None
    return mask[None, :, None]  # [1, nW, 1, N, N]


@_per_window
def mask_added(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    return g.add(logits, shift_mask(spelling))


@_per_window
def mask_added_for_batch(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """The constant repeated for every sample and head, as folding leaves it."""
    shape = (int(spelling.batch), spelling.geometry.num_windows, HEADS, *shift_mask(spelling).shape[3:])
    return g.add(logits, np.broadcast_to(shift_mask(spelling), shape))


@_per_window
def mask_where(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Where(crosses, -inf, logits)."""
    crosses = np.isneginf(shift_mask(spelling))
    return g.op("Where", g.constant(crosses), g.constant(np.float64(-np.inf)), logits)


@_per_window
def mask_where_allowed(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Where(not crosses, logits, -inf)."""
    allowed = ~np.isneginf(shift_mask(spelling))
    return g.op("Where", g.constant(allowed), logits, g.constant(np.float64(-np.inf)))


@_per_window
def mask_computed(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """The region labels partitioned and compared in the graph."""
    labels = g.constant(spelling.geometry.regions().astype(np.float64))
    differ = g.op("Sub", g.unsqueeze(labels, 1), g.unsqueeze(labels, 2))
    same = g.op("Equal", differ, g.constant(np.float64(0.0)))
    mask = g.op("Where", same, g.constant(np.float64(0.0)), g.constant(np.float64(-100.0)))
    return g.op("Add", logits, g.unsqueeze(g.unsqueeze(mask, 1), 0))


def mask_four_axes(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Added to `[B*nW, nH, N, N]` as it is, the mask repeated for every sample."""
    return g.add(logits, np.tile(shift_mask(spelling)[0], (int(spelling.batch), 1, 1, 1)))


# Softmax over the keys.


def softmax_last(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    return g.op("Softmax", logits, axis=-1)


def softmax_axis_3(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    return g.op("Softmax", logits, axis=3)


def softmax_transposed(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Over the second last axis of the transposed logits, then transposed back."""
    return g.transpose(g.op("Softmax", g.transpose(logits, 0, 1, 3, 2), axis=2), 0, 1, 3, 2)


def softmax_then_identity(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Dropout of the inference graph stays as an Identity."""
    return g.op("Identity", softmax_last(g, logits, spelling))


def softmax_guarded(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Rows that the mask leaves no key become zeros: scaled_dot_product_attention with a boolean mask, as exported."""
    weights = g.op("Softmax", logits, axis=-1)
    return g.op("Where", g.op("IsNaN", weights), g.constant(0.0), weights)


def _less_maximum(g: Builder, logits: str, axis: int = 3) -> str:
    return g.op("Sub", logits, g.reduce("ReduceMax", logits, axis))


def softmax_of_exponentials(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """exp(x - max x) / sum(exp(x - max x)), as Keras exporters write it."""
    weights = g.op("Exp", _less_maximum(g, logits))
    return g.op("Div", weights, g.reduce_sum(weights, 3, keepdims=True))


def softmax_of_plain_exponentials(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """exp(x) / sum(exp(x)), two exponentials, the sum without its axis."""
    total = g.unsqueeze(g.reduce_sum(g.op("Exp", logits), -1), -1)
    return g.op("Div", g.op("Exp", logits), total)


def softmax_by_reciprocal(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """1 / sum(exp(x)) * exp(x)."""
    weights = g.op("Exp", _less_maximum(g, logits))
    inverse = g.op("Reciprocal", g.reduce_sum(weights, 3, keepdims=True))
    return g.op("Mul", inverse, weights)


def softmax_by_expanded_sum(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """exp(x) / sum(exp(x)), the sum repeated for every key."""
    weights = g.op("Exp", logits)
    total = g.reduce_sum(weights, 3, keepdims=True)
    return g.op("Div", weights, g.op("Expand", total, g.op("Shape", weights)))


def softmax_by_logsumexp(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """exp(x - logsumexp(x))."""
    return g.op("Exp", g.op("Sub", logits, g.reduce("ReduceLogSumExp", logits, 3)))


def softmax_by_log_of_sum(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """exp(x - log(sum(exp(x)))), x less its maximum."""
    less = _less_maximum(g, logits)
    return g.op("Exp", g.op("Sub", less, g.op("Log", g.reduce_sum(g.op("Exp", less), 3, keepdims=True))))


def softmax_by_logsoftmax(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """exp(log_softmax(x))."""
    return g.op("Exp", g.op("LogSoftmax", logits, axis=3))


def softmax_less_maximum(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """softmax(x - max x)."""
    return g.op("Softmax", _less_maximum(g, logits), axis=-1)


def softmax_in_float32(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Cast up, softmax, cast back, in a half-precision graph."""
    weights = g.op("Softmax", g.op("Cast", logits, to=TensorProto.FLOAT), axis=-1)
    return g.op("Cast", weights, to=spelling.element_type)


# Weighting of the values: `[G, nH, N, N]` and `[G, nH, N, d]` to `[G, nH, N, d]`.


def weighting_matmul(g: Builder, weights: str, v: str) -> str:
    return g.op("MatMul", weights, v)


def weighting_einsum(g: Builder, weights: str, v: str) -> str:
    return g.op("Einsum", weights, v, equation="bhij,bhjd->bhid")


def weighting_sum(g: Builder, weights: str, v: str) -> str:
    """(weights[..., None] * v[..., None, :, :]).sum(-2)."""
    return g.reduce_sum(g.op("Mul", g.unsqueeze(weights, 4), g.unsqueeze(v, 2)), 3)


def weighting_transposed(g: Builder, weights: str, v: str) -> str:
    """(v^T weights^T)^T."""
    product = g.op("MatMul", g.transpose(v, 0, 1, 3, 2), g.transpose(weights, 0, 1, 3, 2))
    return g.transpose(product, 0, 1, 3, 2)
