"""SlideAttention whose logits or weights are predicted (`logits` in place of query and key), in standard operators.

Slot by slot, a shifted value times its weight. Outlook attention predicts the weights of all K queries of a block at
once and adds the blocks up where they overlap: padded maps added, so no Col2Im is needed.
"""

from __future__ import annotations

import math

import numpy as np

from attnrewrite.dims import static
from attnrewrite.functions.body import BodyBuilder, softmax_dtype
from attnrewrite.functions.slide_attention import pure_shifts
from attnrewrite.functions.spec import SlideAttention
from attnrewrite.graph import Graph, Value


def body(spec: SlideAttention, operands: dict[str, Value], opset: int) -> Graph:
    """The op on `logits` [B, nH*K*R, *feature_size] and `value` [B, nH*dv, *key_size] (docs/ops.md; R = K for
    overlap_add, else prod(upsampling)).
    """
    b = BodyBuilder(list(operands.values()), opset)
    geometry, value = spec.geometry, operands["value"]
    heads, slots, pixels = spec.num_heads, geometry.keys_per_query, math.prod(geometry.feature_size)
    batch, channels = value.known_shape[0], static(value.known_shape[1])
    value_dim = channels // heads
    repeats = spec.rows_per_pixel
    weights = _weights(b, spec, operands)
    slot_axis = 3 if spec.overlap_add else 2
    part_shape = (batch, heads, repeats, value_dim, pixels)
    if not spec.overlap_add and repeats > 1:
        part_shape = (batch, heads, value_dim, repeats, pixels)
    elif repeats == 1:
        part_shape = (batch, heads, 1, value_dim, pixels)
    attended: Value | None = None
    shifted = pure_shifts(b, value, operands.get("value_padding"), geometry)
    for weight, slot in zip(b.split(weights, slot_axis, slots), shifted, strict=True):
        if repeats == 1 or spec.overlap_add:  # [B, nH, R, 1, P] * [B, nH, 1, dv, P]
            weight = b.reshape(weight, (batch, heads, repeats, 1, pixels))
            slot = b.reshape(slot, (batch, heads, 1, value_dim, pixels))
        else:  # [B, nH, 1, R, P] * [B, nH, dv, 1, P]
            slot = b.reshape(slot, (batch, heads, value_dim, 1, pixels))
        part = b.op("Mul", [weight, slot], part_shape)
        attended = part if attended is None else b.op("Add", [attended, part], part_shape)
    assert attended is not None
    if spec.overlap_add:
        return b.output(_overlap_add(b, spec, attended, channels))
    return b.output(_spread(b, spec, attended, channels))


def _weights(b: BodyBuilder, spec: SlideAttention, operands: dict[str, Value]) -> Value:
    """The weights, [B, nH, R, K, P] for overlap_add, else [B, nH, K, R, P]."""
    geometry, logits, value = spec.geometry, operands["logits"], operands["value"]
    heads, slots, pixels = spec.num_heads, geometry.keys_per_query, math.prod(geometry.feature_size)
    order = (spec.rows_per_pixel, slots) if spec.overlap_add else (slots, spec.rows_per_pixel)
    shape = (logits.known_shape[0], heads, *order, pixels)
    logits = b.reshape(b.cast(logits, softmax_dtype(spec.softmax_dtype, value)), shape)
    if spec.scale != 1.0:
        logits = b.op("Mul", [logits, b.scalar(spec.scale, logits)], shape)
    if "bias" in operands:
        bias = b.cast(operands["bias"], logits.dtype or np.dtype(np.float32))
        spread = (*bias.known_shape, 1) if spec.overlap_add else (*bias.known_shape, 1, 1)
        rows = (bias.known_shape[0], 1, *spread[1:]) if spec.overlap_add else spread
        logits = b.op("Add", [logits, b.reshape(bias, rows)], shape)
    if spec.predicted == "logits":
        logits = b.op("Softmax", [logits], shape, axis=3 if spec.overlap_add else 2)
    return b.cast(logits, value.dtype or np.dtype(np.float32))


def _overlap_add(b: BodyBuilder, spec: SlideAttention, parts: Value, channels: int) -> Value:
    """[B, nH, K, dv, P] -> [B, nH*dv, *key_size]: row t of pixel l is added at l * stride + offset + t * dilation."""
    geometry = spec.geometry
    batch, slots = parts.known_shape[0], geometry.keys_per_query
    total: Value | None = None
    for part, place in zip(b.split(parts, 2, slots), np.ndindex(*geometry.kernel_size), strict=True):
        map_ = b.reshape(part, (batch, channels, *geometry.feature_size))
        for axis, step in enumerate(geometry.stride):
            map_ = _with_gaps(b, map_, 2 + axis, step)
        starts, ends, before, after = [], [], [], []
        for axis, at in enumerate(place):
            extent, start = static(map_.known_shape[2 + axis]), int(geometry.axis_offsets(axis)[at])
            first, last = max(0, -start), min(extent, geometry.key_size[axis] - start)
            if last <= first:
                break
            starts.append(first)
            ends.append(last)
            before.append(max(0, start))
            after.append(geometry.key_size[axis] - max(0, start) - (last - first))
        else:
            spatial = [2 + a for a in range(len(starts))]
            if any(starts) or any(e != map_.known_shape[a] for a, e in zip(spatial, ends, strict=True)):
                map_ = b.slice(map_, spatial, starts, ends)
            map_ = b.pad(map_, [0, 0, *before], [0, 0, *after])
            total = map_ if total is None else b.op("Add", [total, map_], map_.known_shape)
    assert total is not None
    return total


def _with_gaps(b: BodyBuilder, map_: Value, axis: int, step: int) -> Value:
    """step - 1 zeros after every position of an axis."""
    if step == 1:
        return map_
    shape = map_.known_shape
    inner, after = [static(e) for e in shape[1 : axis + 1]], math.prod(static(e) for e in shape[axis + 1 :])
    apart = b.reshape(map_, (shape[0], math.prod(inner), 1, after))
    padded = b.pad(apart, [0, 0, 0, 0], [0, 0, step - 1, 0])
    return b.reshape(padded, (*shape[:axis], inner[-1] * step, *shape[axis + 1 :]))


def _spread(b: BodyBuilder, spec: SlideAttention, attended: Value, channels: int) -> Value:
    """[B, nH, dv, U, P] -> [B, nH*dv, *(feature_size * upsampling)]: row u of a pixel is one place in its block."""
    sizes, factors = spec.geometry.feature_size, spec.upsampling or (1,) * len(spec.geometry.feature_size)
    batch, done = attended.known_shape[0], list(sizes)
    for axis in reversed(range(len(sizes))):
        if factors[axis] == 1:
            continue
        outer = channels * math.prod(factors[:axis])
        before, after = math.prod(sizes[: axis + 1]), math.prod(done[axis + 1 :])
        apart = b.reshape(attended, (batch, outer, factors[axis], before, after))
        attended = b.transpose(apart, (0, 1, 3, 2, 4))
        done[axis] = sizes[axis] * factors[axis]
    return b.reshape(attended, (batch, channels, *done))
