"""Window attention as converters other than PyTorch's write it: tf2onnx (Keras, channels last) and paddle2onnx.

Each function returns the model of `x + proj(attention)` on `[B, 8, 12, C]` with a symbolic batch, windows of 4 x 4; it
computes what a `WindowSpelling` computes. Their habits: extents read off the tensor (Shape, Slice, Concat) for every
Reshape, Linear layers as Einsum or on flattened rows, strided slices that are squeezed, a roll written for each axis.
Letters as in onnx_windows.
"""

from __future__ import annotations

import numpy as np
import onnx

from tests.models.onnx_builder import END, Builder
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, PLAIN, SHIFTED, Weights, bias_of, relative_index

SCALE = HEAD_DIM**-0.5
ROWS, COLUMNS = 2, 3  # of windows


def _input(g: Builder) -> str:
    return g.input("x", ["batch", 8, 12, CHANNELS])


def _shaped(g: Builder, x: str, of: str, *extents: int) -> str:
    """Reshape to [batch of `of`, *extents], the batch read off the tensor; -2 in the first place multiplies it by the
    number of windows.
    """
    batch = g.slice(g.op("Shape", of), 0, 1, 0)
    if extents[0] == -2:
        batch, extents = g.mul(batch, np.array([ROWS * COLUMNS])), extents[1:]
    return g.op("Reshape", x, g.op("Concat", batch, g.constant(list(extents)), axis=0))


def _dense(g: Builder, x: str, weight: np.ndarray, bias: np.ndarray, length: int) -> str:
    """Keras' Dense on `[G, length, C]`: tensordot flattens, multiplies and restores."""
    rows = g.matmul(g.reshape(x, -1, weight.shape[0]), weight)
    return g.add(_shaped(g, rows, x, length, weight.shape[1]), bias)


def _picked(g: Builder, x: str, part: int) -> str:
    """x[part] as a strided slice whose axis is dropped."""
    return g.squeeze(g.slice(x, part, part + 1, 0), 0)


def _roll(g: Builder, x: str, shift: int, axis: int) -> str:
    """tf.roll by -shift: the tail before the head."""
    return g.op("Concat", g.slice(x, shift, END, axis), g.slice(x, 0, shift, axis), axis=axis)


def keras_shifted(opset: int = 13) -> onnx.ModelProto:
    """A Keras Swin: shifted windows, the bias gathered from its table and the mask added in the graph."""
    g, weights = Builder(opset), Weights.of(SHIFTED)
    x = _input(g)
    rolled = _roll(g, _roll(g, x, 2, 1), 2, 2)
    windows = g.transpose(g.reshape(rolled, -1, ROWS, 4, COLUMNS, 4, CHANNELS), 0, 1, 3, 2, 4, 5)
    tokens = g.reshape(g.reshape(windows, -1, 4, 4, CHANNELS), -1, 16, CHANNELS)
    qkv = _dense(g, tokens, weights.qkv, weights.qkv_bias, 16)
    qkv = g.transpose(_shaped(g, qkv, tokens, 16, 3, HEADS, HEAD_DIM), 2, 0, 3, 1, 4)
    query, key, value = (_picked(g, qkv, part) for part in range(3))
    logits = g.op("MatMul", g.mul(query, SCALE), g.transpose(key, 0, 1, 3, 2))
    table = g.op("Gather", g.constant(weights.table), g.constant(relative_index(SHIFTED).reshape(-1)), axis=0)
    logits = g.op("Add", logits, g.unsqueeze(g.transpose(g.reshape(table, 16, 16, HEADS), 2, 0, 1), 0))
    mask = np.where(SHIFTED.crosses_regions(), -100.0, 0.0)[None, :, None]
    logits = g.reshape(g.add(g.reshape(logits, -1, ROWS * COLUMNS, HEADS, 16, 16), mask), -1, HEADS, 16, 16)
    attended = g.transpose(g.op("MatMul", g.op("Softmax", logits, axis=3), value), 0, 2, 1, 3)
    tokens = _dense(g, _shaped(g, attended, tokens, 16, CHANNELS), weights.proj, weights.proj_bias, 16)
    merged = g.reshape(g.reshape(tokens, -1, 4, 4, CHANNELS), -1, ROWS, COLUMNS, 4, 4, CHANNELS)
    merged = g.reshape(g.transpose(merged, 0, 1, 3, 2, 4, 5), -1, 8, 12, CHANNELS)
    return g.model({"y": g.op("Add", x, _roll(g, _roll(g, merged, 6, 1), 10, 2))})


def keras_multi_head() -> onnx.ModelProto:
    """keras.layers.MultiHeadAttention on windows: every Linear an Einsum with a weight `[C, nH, d]` or `[nH, d, C]`."""
    g, weights = Builder(13), Weights.of(PLAIN)
    x = _input(g)
    windows = g.transpose(g.reshape(x, -1, ROWS, 4, COLUMNS, 4, CHANNELS), 0, 1, 3, 2, 4, 5)
    tokens = g.reshape(windows, -1, 16, CHANNELS)
    parts = []
    for part in range(3):
        weight, bias = weights.part(part)
        projected = g.op(
            "Einsum", tokens, g.constant(weight.reshape(CHANNELS, HEADS, HEAD_DIM)), equation="abc,cde->abde"
        )
        parts.append(g.add(projected, bias.reshape(HEADS, HEAD_DIM)))
    query, key, value = parts
    logits = g.op("Einsum", key, g.mul(query, SCALE), equation="aecd,abcd->acbe")
    probabilities = g.op("Softmax", g.add(logits, bias_of(PLAIN)), axis=-1)
    attended = g.op("Einsum", probabilities, value, equation="acbe,aecd->abcd")
    proj = g.constant(weights.proj.reshape(HEADS, HEAD_DIM, CHANNELS))
    tokens = g.add(g.op("Einsum", attended, proj, equation="abcd,cde->abe"), weights.proj_bias)
    merged = g.transpose(g.reshape(tokens, -1, ROWS, COLUMNS, 4, 4, CHANNELS), 0, 1, 3, 2, 4, 5)
    return g.model({"y": g.op("Add", x, g.reshape(merged, -1, 8, 12, CHANNELS))})


def paddle_shifted() -> onnx.ModelProto:
    """A PaddlePaddle Swin of opset 11: tokens `[B, H*W, C]` between the blocks, scale as Mul and Add."""
    g, weights = Builder(11), Weights.of(SHIFTED)
    x = _input(g)
    stream = g.reshape(x, 0, 96, CHANNELS)
    rolled = g.reshape(stream, 0, 8, 12, CHANNELS)
    for axis, extent in ((1, 8), (2, 12)):
        pieces = [g.slice(rolled, -extent + 2, extent, axis), g.slice(rolled, 0, -extent + 2, axis)]
        rolled = g.op("Concat", *pieces, axis=axis)
    windows = g.transpose(g.reshape(rolled, 0, ROWS, 4, COLUMNS, 4, CHANNELS), 0, 1, 3, 2, 4, 5)
    tokens = g.reshape(windows, -1, 16, CHANNELS)
    qkv = g.reshape(g.linear(tokens, weights.qkv, weights.qkv_bias), -1, 16, 3, HEADS, HEAD_DIM)
    query, key, value = (g.squeeze(p, 0) for p in g.split(g.transpose(qkv, 2, 0, 3, 1, 4), [1, 1, 1], 0))
    query = g.add(g.mul(query, np.array([SCALE])), np.array([0.0]))
    logits = g.op("Add", g.op("MatMul", query, g.transpose(key, 0, 1, 3, 2)), g.constant(bias_of(SHIFTED)[0]))
    mask = np.where(SHIFTED.crosses_regions(), -100.0, 0.0)
    logits = g.reshape(logits, -1, ROWS * COLUMNS, HEADS, 16, 16)
    mask_value = g.unsqueeze(g.unsqueeze(g.constant(mask), 1), 0)
    logits = g.reshape(g.op("Add", logits, mask_value), -1, HEADS, 16, 16)
    probabilities = g.op("Dropout", g.op("Softmax", logits, axis=3))
    attended = g.reshape(g.transpose(g.op("MatMul", probabilities, value), 0, 2, 1, 3), 0, 16, CHANNELS)
    tokens = g.reshape(g.linear(attended, weights.proj, weights.proj_bias), -1, 4, 4, CHANNELS)
    merged = g.transpose(g.reshape(tokens, -1, ROWS, COLUMNS, 4, 4, CHANNELS), 0, 1, 3, 2, 4, 5)
    merged = g.reshape(merged, -1, 8, 12, CHANNELS)
    for axis, extent in ((1, 8), (2, 12)):
        pieces = [g.slice(merged, -2, extent, axis), g.slice(merged, 0, -2, axis)]
        merged = g.op("Concat", *pieces, axis=axis)
    result = g.op("Add", stream, g.reshape(merged, 0, 96, CHANNELS))
    return g.model({"y": g.reshape(result, 0, 8, 12, CHANNELS)})
