"""Ways to write what is added to the logits of windows on any number of axes, rotary positions, and whole attentions.

Letters: G = B*nW groups, N queries and M keys per window, C channels, nH heads, d head_dim, w_a extents of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnrewrite.localattention.geometry import Sizes
from tests.models.onnx_builder import Builder
from tests.models.onnx_fused import ORT
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, Triple, WindowSpelling

if TYPE_CHECKING:
    from tests.property.draw_blocks import Block

# Relative position bias: values [nH, N, N] and ways to write them on logits [G, nH, N, N].


def relative_index(window: Sizes) -> np.ndarray:
    """int64 [N, N]: the row of a table of prod(2 w_a - 1) relative positions."""
    places = np.indices(window).reshape(len(window), -1)
    distance = places[:, :, None] - places[:, None, :] + (np.array(window) - 1)[:, None, None]
    return np.ravel_multi_index(tuple(distance), tuple(2 * w - 1 for w in window))


def _table(window: Sizes) -> np.ndarray:
    return np.random.default_rng(11).normal(size=(math.prod(2 * w - 1 for w in window), HEADS)) * 0.7


def bias_values(spelling: WindowSpelling) -> np.ndarray:
    """float64 [nH, N, N]."""
    window = spelling.geometry.window_size
    return _table(window)[relative_index(window)].transpose(2, 0, 1)


def bias_constant(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    return g.add(logits, bias_values(spelling)[None])


def bias_without_batch(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    return g.op("Add", g.constant(bias_values(spelling)), logits)


def bias_subtracted(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    return g.op("Sub", logits, g.constant(-bias_values(spelling)))


def bias_gathered(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """table[index] in the graph."""
    window, size = spelling.geometry.window_size, spelling.geometry.tokens_per_window
    rows = g.op("Gather", g.constant(_table(window)), g.constant(relative_index(window).reshape(-1)), axis=0)
    bias = g.transpose(g.reshape(rows, size, size, HEADS), 2, 0, 1)
    return g.op("Add", logits, g.unsqueeze(bias, 0))


def bias_by_mlp(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Two Linears over the coordinates of the table, computed in the graph, then gathered (Swin V2, CrossFormer)."""
    window, size = spelling.geometry.window_size, spelling.geometry.tokens_per_window
    rng = np.random.default_rng(12)
    coordinates = np.indices([2 * w - 1 for w in window]).reshape(len(window), -1).T / max(window)
    hidden = g.op("Relu", g.linear(g.constant(coordinates), rng.normal(size=(len(window), 8)), rng.normal(size=8)))
    table = g.op("Sigmoid", g.matmul(hidden, rng.normal(size=(8, HEADS))))
    rows = g.op("Gather", table, g.constant(relative_index(window).reshape(-1)), axis=0)
    bias = g.mul(g.transpose(g.reshape(rows, size, size, HEADS), 2, 0, 1), 4.0)
    return g.op("Add", logits, g.unsqueeze(bias, 0))


def bias_per_axis(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """One table for every axis, each added on its own to the logits seen as [G, nH, *w, *w]."""
    window, size = spelling.geometry.window_size, spelling.geometry.tokens_per_window
    rng = np.random.default_rng(13)
    view = g.reshape(logits, -1, HEADS, *window, *window)
    for axis, extent in enumerate(window):
        shape = [extent if a == axis else 1 for a in range(len(window))]
        view = g.add(view, rng.normal(size=(HEADS, *shape, *shape)))
    return g.reshape(view, -1, HEADS, size, size)


BIASES = [bias_constant, bias_without_batch, bias_subtracted, bias_gathered, bias_by_mlp, bias_per_axis]

# Masks on logits [G, nH, N, N]: causal windows.


def causal_added(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    size = spelling.geometry.tokens_per_window
    return g.add(logits, np.where(np.tri(size, dtype=bool), 0.0, -np.inf))


def causal_where(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    size = spelling.geometry.tokens_per_window
    lowest = g.constant(np.float64(np.finfo(np.float32).min))
    return g.op("Where", g.constant(np.tri(size, dtype=bool)), logits, lowest)


def causal_by_range(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Positions compared in the graph."""
    size = spelling.geometry.tokens_per_window
    at = g.op("Range", *map(g.constant, (0, size, 1)))
    later = g.op("Less", g.reshape(at, -1, 1), g.reshape(at, 1, -1))
    return g.op("Where", later, g.constant(np.float64(-np.inf)), logits)


CAUSAL = [causal_added, causal_where, causal_by_range]

# Query-dependent relative position: logits + sum over the axes of q[n] . R_a[n_a, m_a] (SAM, ViTDet).

LETTERS = "hwt"


def _tables(window: Sizes) -> list[np.ndarray]:
    """float64 [w_a, w_a, d] of every axis."""
    rng = np.random.default_rng(14)
    found = []
    for extent in window:
        at = np.arange(extent)
        found.append(rng.normal(size=(2 * extent - 1, HEAD_DIM))[at[:, None] - at + extent - 1] * 0.4)
    return found


def relative_by_einsum(g: Builder, logits: str, q: str, spelling: WindowSpelling) -> str:
    """An Einsum per axis, each added to the logits seen as [G*nH, *w, *w]."""
    window, size = spelling.geometry.window_size, spelling.geometry.tokens_per_window
    rank = len(window)
    letters = LETTERS[:rank]
    asking = g.reshape(q, -1, *window, HEAD_DIM)
    view = g.reshape(logits, -1, *window, *window)
    for axis, table in enumerate(_tables(window)):
        equation = f"b{letters}c,{letters[axis]}kc->b{letters}k"
        part = g.op("Einsum", asking, g.constant(table), equation=equation)
        ones = [e if a == axis else 1 for a, e in enumerate(window)]
        view = g.op("Add", view, g.reshape(part, -1, *window, *ones))
    return g.reshape(view, -1, HEADS, size, size)


def relative_by_sum(g: Builder, logits: str, q: str, spelling: WindowSpelling) -> str:
    """(q[.., :, None, :] * R).sum(-1), the table of all axes at once."""
    window, size = spelling.geometry.window_size, spelling.geometry.tokens_per_window
    places = np.indices(window).reshape(len(window), -1)
    full = sum(
        (t[p[:, None], p] for t, p in zip(_tables(window), places, strict=True)), np.zeros((size, size, HEAD_DIM))
    )
    return g.op("Add", logits, g.reduce_sum(g.mul(g.unsqueeze(q, 3), full), 4))


OnQuery = Callable[[Builder, str, str, WindowSpelling], str]
RELATIVE: list[OnQuery] = [relative_by_einsum, relative_by_sum]

# Rotary positions inside the window, on [G, nH, N, d]; the last of the five channels stays as it is.

PAIRS = HEAD_DIM // 2
Turn = Callable[[Builder, str, int], str]


def _angles(tokens: int) -> np.ndarray:
    return np.arange(tokens)[:, None] * np.array([1.0, 0.3])[:PAIRS]


def rotary_by_halves(g: Builder, x: str, tokens: int) -> str:
    """x * cos + concat(-x2, x1) * sin."""
    turned, rest = g.split(x, [2 * PAIRS, 1], 3)
    first, second = g.split(turned, [PAIRS, PAIRS], 3)
    half = g.concat([g.op("Neg", second), first], 3)
    cosines, sines = (np.tile(f(_angles(tokens)), 2) for f in (np.cos, np.sin))
    return g.concat([g.op("Add", g.mul(turned, cosines), g.mul(half, sines)), rest], 3)


def rotary_by_pairs(g: Builder, x: str, tokens: int) -> str:
    """Neighbouring channels are a pair: stack((-x[1::2], x[::2])) flattened."""
    turned, rest = g.slice(x, 0, 2 * PAIRS, 3), g.slice(x, 2 * PAIRS, HEAD_DIM, 3)
    even, odd = g.slice(turned, 0, 2 * PAIRS, 3, 2), g.slice(turned, 1, 2 * PAIRS, 3, 2)
    stacked = g.concat([g.unsqueeze(g.op("Neg", odd), 4), g.unsqueeze(even, 4)], 4)
    half = g.reshape(stacked, -1, HEADS, tokens, 2 * PAIRS)
    cosines, sines = (np.repeat(f(_angles(tokens)), 2, axis=1) for f in (np.cos, np.sin))
    return g.concat([g.op("Add", g.mul(turned, cosines), g.mul(half, sines)), rest], 3)


def rotary_by_parts(g: Builder, x: str, tokens: int) -> str:
    """concat(x1 cos - x2 sin, x2 cos + x1 sin, rest)."""
    first, second, rest = g.split(x, [PAIRS, PAIRS, 1], 3)
    cosines, sines = np.cos(_angles(tokens)), np.sin(_angles(tokens))
    one = g.op("Sub", g.mul(first, cosines), g.mul(second, sines))
    two = g.op("Add", g.mul(second, cosines), g.mul(first, sines))
    return g.concat([one, two, rest], 3)


ROTARY: list[Turn] = [rotary_by_halves, rotary_by_pairs, rotary_by_parts]

# Heads as torch.nn.MultiheadAttention makes them, and windows of any number of tokens folded with their heads.


def heads_of_multi_head(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """Tokens first: [N, G, C], a packed Linear, q/k/v in front, heads beside the groups."""
    size, weights = spelling.geometry.tokens_per_window, spelling.weights
    packed = g.linear(g.transpose(tokens, 1, 0, 2), weights.qkv, weights.qkv_bias)
    apart = g.transpose(g.unsqueeze(g.reshape(packed, size, -1, 3, CHANNELS), 0), 3, 1, 2, 0, 4)
    parts = [g.reshape(g.squeeze(g.gather(apart, i, 0), 2), size, -1, HEAD_DIM) for i in range(3)]
    q, k, v = (g.reshape(g.transpose(part, 1, 0, 2), -1, HEADS, size, HEAD_DIM) for part in parts)
    return q, k, v


def heads_in_front(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """[nH, G, N, d] for a while: a chunk per head, stacked (opset 11's Split and Concat)."""
    found = []
    for i in range(3):
        part = g.linear(tokens, *spelling.weights.part(i))
        stacked = g.concat([g.unsqueeze(h, 0) for h in g.split(part, [HEAD_DIM] * HEADS, 2)], 0)
        found.append(g.transpose(stacked, 1, 0, 2, 3))
    return found[0], found[1], found[2]


# Whole attentions: q, k, v [G, nH, N or M, d] to [G, nH, N, d].

Attention = Callable[[Builder, str, str, str, "Block"], str]


def written_out(g: Builder, q: str, k: str, v: str, block: Block) -> str:
    """Logits, what is added to them, softmax, weighted values, as the fields of the spelling say."""
    logits = block.logits(g, q, k, block.scale)
    if block.relative is not None:
        logits = block.relative(g, logits, q, block)
    for step in block.added:
        logits = step(g, logits, block)
    return block.weighting(g, block.softmax(g, logits, block), v)


def folded_heads(g: Builder, q: str, k: str, v: str, block: Block) -> str:
    """torch.bmm: three axes, the heads among the groups."""
    q3, k3, v3 = (g.reshape(x, -1, n, HEAD_DIM) for x, n in ((q, block.queries), (k, block.keys), (v, block.keys)))
    logits = g.mul(g.op("MatMul", q3, g.transpose(k3, 0, 2, 1)), block.scale)
    if block.added:
        logits = g.reshape(logits, -1, HEADS, block.queries, block.keys)
        for step in block.added:
            logits = step(g, logits, block)
        logits = g.reshape(logits, -1, block.queries, block.keys)
    attended = g.op("MatMul", g.op("Softmax", logits, axis=2), v3)
    return g.reshape(attended, -1, HEADS, block.queries, HEAD_DIM)


def _constant_term(block: Block) -> np.ndarray | None:
    """float64 [1 or G, nH or 1, N, M], all that is added to the logits; a window's own is repeated for the batch."""
    if not block.constants:
        return None
    found = block.constants[0]
    for values in block.constants[1:]:
        found = found + values
    return found if len(found) == 1 else np.tile(found, (int(block.batch), 1, 1, 1))


def standard_operator(g: Builder, q: str, k: str, v: str, block: Block) -> str:
    """ONNX Attention, opset 23; a boolean mask where nothing but exclusion is added."""
    term = _constant_term(block)
    if term is None:
        return g.op("Attention", q, k, v, scale=block.scale)
    excludes = np.isneginf(term)
    if np.array_equal(term, np.where(excludes, -np.inf, 0.0)):
        return g.op("Attention", q, k, v, g.constant(~excludes), scale=block.scale)
    return g.op("Attention", q, k, v, g.constant(term), scale=block.scale)


def standard_operator_of_tokens(g: Builder, q: str, k: str, v: str, block: Block) -> str:
    """ONNX Attention of [G, N, C], heads as an attribute."""
    term = _constant_term(block)
    operands = [_tokens(g, x, n) for x, n in ((q, block.queries), (k, block.keys), (v, block.keys))]
    operands += [] if term is None else [g.constant(term)]
    found = g.op("Attention", *operands, q_num_heads=HEADS, kv_num_heads=HEADS, scale=block.scale)
    return g.transpose(g.reshape(found, -1, block.queries, HEADS, HEAD_DIM), 0, 2, 1, 3)


def multi_head_operator(g: Builder, q: str, k: str, v: str, block: Block) -> str:
    """com.microsoft.MultiHeadAttention."""
    term = _constant_term(block)
    operands: Sequence[str] = [_tokens(g, x, n) for x, n in ((q, block.queries), (k, block.keys), (v, block.keys))]
    operands = operands if term is None else [*operands, "", "", g.constant(term)]
    found = g.op("MultiHeadAttention", *operands, domain=ORT, num_heads=HEADS, scale=block.scale)
    return g.transpose(g.reshape(found, -1, block.queries, HEADS, HEAD_DIM), 0, 2, 1, 3)


def fused_products(g: Builder, q: str, k: str, v: str, block: Block) -> str:
    """com.microsoft.FusedMatMul: the scale and the transpose of the key in the product."""
    logits = g.op("FusedMatMul", q, k, domain=ORT, transB=1, alpha=block.scale)
    for step in block.added:
        logits = step(g, logits, block)
    return g.op("FusedMatMul", g.op("Softmax", logits, axis=-1), v, domain=ORT)


def _tokens(g: Builder, x: str, count: int) -> str:
    return g.reshape(g.transpose(x, 0, 2, 1, 3), -1, count, CHANNELS)
