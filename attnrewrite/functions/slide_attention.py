"""SlideAttention in standard operators of rank 5 at most, without copying K and V k^2 times.

Slot by slot: a shifted slice of the padded keys (a gather of rows and columns where the border reads other pixels, one
depthwise convolution where the shift is learned) times the query, summed over head_dim; softmax over the slots; a
weighted sum of shifted values. Of the forms measured in ONNX Runtime (one-hot depthwise convolution, stacked slices,
slices one by one) this one is the fastest for every kernel size.
"""

from __future__ import annotations

import itertools

import numpy as np

from attnrewrite.dims import Shape, static
from attnrewrite.functions.body import BodyBuilder, softmax_dtype
from attnrewrite.functions.spec import SlideAttention
from attnrewrite.graph import Graph, Value
from attnrewrite.localattention.geometry import PADDING, NeighborhoodGeometry


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
        logits = b.op("Add", [logits, _bias(b, b.cast(operands["bias"], logits.dtype))], logits.known_shape)
    if "exclude" in geometry.borders:
        outside = b.constant((geometry.pixels() == PADDING).T[None, None])
        excluded = b.constant(np.array(-np.inf, logits.dtype))
        logits = b.op("Where", [outside, excluded, logits], logits.known_shape, logits.dtype)
    weights = b.cast(b.op("Softmax", [logits], logits.known_shape, axis=2), query.dtype or np.dtype(np.float32))
    attended: Value | None = None
    shape: Shape = (batch, heads, value_dim, pixels)
    for weight, value in zip(b.split(weights, 2, slots), _shifted(b, operands, "value", geometry), strict=True):
        part = b.op("Mul", [weight, b.reshape(value, shape)], shape)
        attended = part if attended is None else b.op("Add", [attended, part], shape)
    assert attended is not None
    return b.output(b.reshape(attended, (batch, heads * value_dim, *geometry.feature_size)))


def _bias(b: BodyBuilder, bias: Value) -> Value:
    """[1|nH, K] or [1|nH, P, K] as it is added to logits [B, nH, K, P]."""
    if len(bias.known_shape) == 3:
        return b.transpose(bias, (0, 2, 1))
    return b.reshape(bias, (*bias.known_shape, 1))


def _shifted(b: BodyBuilder, operands: dict[str, Value], name: str, geometry: NeighborhoodGeometry) -> list[Value]:
    """The operand as each slot reads it, [B, C, *S] each."""
    kernel, bias = operands.get(f"{name}_kernel"), operands.get(f"{name}_bias")
    channels, axes = static(operands[name].known_shape[1]), len(geometry.feature_size)
    if kernel is None:
        slots = pure_shifts(b, operands[name], operands.get(f"{name}_padding"), geometry)
    else:
        slots = _learned_shifts(b, operands[name], _for_every_channel(b, kernel, channels), geometry)
    if bias is None:
        return slots
    bias = _for_every_channel(b, bias, channels)
    added = []
    for slot, value in enumerate(slots):
        offset = b.reshape(b.slice(bias, [1], [slot], [slot + 1]), (channels, *[1] * axes))
        added.append(b.op("Add", [value, offset], value.known_shape))
    return added


def pure_shifts(b: BodyBuilder, data: Value, padding: Value | None, geometry: NeighborhoodGeometry) -> list[Value]:
    """Slices of the padded map where slots lie one stride apart, and constant gathers along the axes where a border
    reads other pixels.
    """
    axes = range(len(geometry.feature_size))
    before, tables = [0] * len(axes), []
    after = list(before)
    for axis in axes:
        table, position, extent = geometry.axis_table(axis), geometry.axis_positions(axis), geometry.key_size[axis]
        if (table == PADDING).any():
            before[axis] = max(0, -int(position.min()))
            after[axis] = max(0, int(position.max()) - extent + 1)
            table = position + before[axis]
        tables.append(table)
    padded = _padded(b, data, before, after, padding)
    steps = geometry.stride
    sliced = [axis for axis in axes if (np.diff(tables[axis], axis=0) == steps[axis]).all()]
    gathered: dict[tuple[int, ...], Value] = {(): padded}  # by the places in the kernel along the other axes
    slots = []
    for at in itertools.product(*map(range, geometry.kernel_size)):
        done: tuple[int, ...] = ()
        for axis in axes:
            if axis in sliced:
                continue
            value, done = gathered[done], (*done, at[axis])
            if done not in gathered:
                gathered[done] = b.gather(value, tables[axis][:, at[axis]], 2 + axis)
        starts = [int(tables[a][0, at[a]]) for a in sliced]
        ends = [start + (geometry.feature_size[a] - 1) * steps[a] + 1 for start, a in zip(starts, sliced, strict=True)]
        slots.append(b.slice(gathered[done], [2 + a for a in sliced], starts, ends, [steps[a] for a in sliced]))
    return slots


def _padded(b: BodyBuilder, data: Value, before: list[int], after: list[int], vector: Value | None) -> Value:
    """The map with zeros around it, or with this vector [C]."""
    padded = b.pad(data, [0, 0, *before], [0, 0, *after])
    if vector is None or padded is data:
        return padded
    extents, shape = [static(e) for e in data.known_shape[2:]], padded.known_shape
    inside = np.zeros([static(e) for e in shape[2:]], bool)
    inside[tuple(slice(s, s + e) for s, e in zip(before, extents, strict=True))] = True
    spread = b.reshape(vector, (vector.known_shape[0], *[1] * len(extents)))
    return b.op("Where", [b.constant(inside), padded, spread], shape, data.dtype)


def _learned_shifts(b: BodyBuilder, data: Value, kernel: Value, geometry: NeighborhoodGeometry) -> list[Value]:
    """One depthwise convolution [C, K, *kernel_size] per slot; the geometry is plain, its border zero."""
    if not geometry.is_plain or geometry.border != "zero":
        raise ValueError(f"shift kernels need a centred neighbourhood of zero border, got {geometry}")
    radius = [-o for o in geometry.offset]
    slots = []
    for slot in range(geometry.keys_per_query):
        weight = b.slice(kernel, [1], [slot], [slot + 1])
        pads, dilations = [*radius, *radius], list(geometry.dilation)
        groups = data.known_shape[1]
        slots.append(b.op("Conv", [data, weight], data.known_shape, group=groups, pads=pads, dilations=dilations))
    return slots


def _for_every_channel(b: BodyBuilder, rows: Value, channels: int) -> Value:
    """[R, ...] -> [C, ...]: channel c uses row c mod R."""
    assert rows.shape is not None
    repeats = channels // static(rows.shape[0])
    return rows if repeats == 1 else b.concat([rows] * repeats, 0)
