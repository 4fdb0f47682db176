"""SlideAttention in standard operators of rank 5 at most, without copying K and V k^2 times.

Slot by slot: a shifted slice of the padded keys (or one depthwise convolution, where the shift is learned) times the
query, summed over head_dim; softmax over the slots; a weighted sum of shifted values. Of the forms measured in ONNX
Runtime (one-hot depthwise convolution, stacked slices, slices one by one) this one is the fastest for every kernel
size.
"""

from __future__ import annotations

import itertools

import numpy as np

from attnrewrite.dims import Shape, static
from attnrewrite.functions.body import BodyBuilder, softmax_dtype
from attnrewrite.functions.spec import SlideAttention
from attnrewrite.graph import Graph, Value
from attnrewrite.localattention.geometry import NeighborhoodGeometry


def body(spec: SlideAttention, operands: dict[str, Value], opset: int) -> Graph:
    """The op on these operands (docs/ops.md; `query`, `key`, `value` [B, C, *S] and any of the optional ones)."""
    b = BodyBuilder(list(operands.values()), opset)
    heads, geometry = spec.num_heads, spec.geometry
    query, value_shape = operands["query"], operands["value"].shape
    assert query.shape is not None and value_shape is not None
    batch, pixels = query.shape[0], int(np.prod(geometry.feature_size))
    head_dim = static(query.shape[1]) // heads
    value_dim = static(value_shape[1]) // heads
    slots = geometry.keys_per_query

    q = query
    if spec.scale != 1.0:
        q = b.op("Mul", [q, b.scalar(spec.scale, q)], query.shape)
    scores = []
    for key in _shifted(b, operands, "key", geometry):
        product = b.reshape(b.op("Mul", [q, key], query.shape), (batch, heads, head_dim, pixels))
        scores.append(b.op("ReduceSum", [product, b.ints([2])], (batch, heads, 1, pixels), keepdims=1))
    logits = b.cast(b.concat(scores, 2), softmax_dtype(spec.softmax_dtype, query))
    assert logits.shape is not None and logits.dtype is not None
    if "bias" in operands:
        bias = b.reshape(b.cast(operands["bias"], logits.dtype), (heads, slots, 1))
        logits = b.op("Add", [logits, bias], logits.known_shape)
    weights = b.cast(b.op("Softmax", [logits], logits.known_shape, axis=2), query.dtype or np.dtype(np.float32))
    attended: Value | None = None
    shape: Shape = (batch, heads, value_dim, pixels)
    for weight, value in zip(b.split(weights, 2, slots), _shifted(b, operands, "value", geometry), strict=True):
        part = b.op("Mul", [weight, b.reshape(value, shape)], shape)
        attended = part if attended is None else b.op("Add", [attended, part], shape)
    assert attended is not None
    return b.output(b.reshape(attended, (batch, heads * value_dim, *geometry.feature_size)))


def _shifted(b: BodyBuilder, operands: dict[str, Value], name: str, geometry: NeighborhoodGeometry) -> list[Value]:
    """The operand as each slot reads it, [B, C, *S] each."""
    data, kernel, bias = operands[name], operands.get(f"{name}_kernel"), operands.get(f"{name}_bias")
    assert data.shape is not None
    channels, axes = static(data.shape[1]), list(range(2, len(data.shape)))
    radius = [d * (k // 2) for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    slots: list[Value] = []
    if kernel is None:
        padded = b.pad(data, [0, 0, *radius], [0, 0, *radius])
        steps = (range(0, 2 * r + 1, d) for r, d in zip(radius, geometry.dilation, strict=True))
        for start in itertools.product(*steps):
            ends = [s + e for s, e in zip(start, geometry.feature_size, strict=True)]
            slots.append(b.slice(padded, axes, start, ends))
    else:
        kernel = _for_every_channel(b, kernel, channels)
        for slot in range(geometry.keys_per_query):
            weight = b.slice(kernel, [1], [slot], [slot + 1])
            pads = [*radius, *radius]
            dilations = list(geometry.dilation)
            slots.append(b.op("Conv", [data, weight], data.shape, group=channels, pads=pads, dilations=dilations))
    if bias is None:
        return slots
    bias = _for_every_channel(b, bias, channels)
    added = []
    for slot, value in enumerate(slots):
        offset = b.reshape(b.slice(bias, [1], [slot], [slot + 1]), (channels, *[1] * len(axes)))
        added.append(b.op("Add", [value, offset], data.shape))
    return added


def _for_every_channel(b: BodyBuilder, rows: Value, channels: int) -> Value:
    """[R, ...] -> [C, ...]: channel c uses row c mod R."""
    assert rows.shape is not None
    repeats = channels // static(rows.shape[0])
    return rows if repeats == 1 else b.concat([rows] * repeats, 0)
