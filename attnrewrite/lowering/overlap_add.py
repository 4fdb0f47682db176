"""Col2Im (overlap-add), which TVM's importer lacks, as padded maps added up: one per place of the block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import ir, relax


def col2im(bb: relax.BlockBuilder, inputs: list[Any], attrs: Mapping[str, Any]) -> Any:
    """data [B, C*K, L] added up on [B, C, *image]; None where image or block is computed, or C is unknown.

    Source: https://onnx.ai/onnx/operators/onnx__Col2Im.html
    """
    data = inputs[0] if isinstance(inputs[0], relax.Var) else bb.emit(inputs[0])
    if not all(isinstance(v, ir.GenericConst) for v in inputs[1:3]):
        return None
    image, block = ([int(e) for e in v.value.numpy().reshape(-1)] for v in inputs[1:3])
    axes = len(image)
    strides = [int(s) for s in attrs.get("strides") or [1] * axes]
    dilations = [int(d) for d in attrs.get("dilations") or [1] * axes]
    pads = [int(p) for p in attrs.get("pads") or [0] * (2 * axes)]
    batch, places = data.ty.shape[0], math.prod(block)
    channels = int(data.ty.shape[1]) // places
    blocks = [
        (image[a] + pads[a] + pads[axes + a] - dilations[a] * (block[a] - 1) - 1) // strides[a] + 1 for a in range(axes)
    ]
    spread = bb.emit(relax.op.reshape(data, [batch, channels, places, math.prod(blocks)]))
    total = None
    for place, at in enumerate(np.ndindex(*block)):
        starts = [int(i) * d - p for i, d, p in zip(at, dilations, pads, strict=False)]
        part = bb.emit(relax.op.strided_slice(spread, [2], [place], [place + 1]))
        map_ = bb.emit(relax.op.reshape(part, [batch, channels, *blocks]))
        placed = _placed(bb, map_, [batch, channels, *blocks], starts, strides, image)
        if placed is not None:
            total = placed if total is None else bb.emit(relax.op.add(total, placed))
    return total


def _placed(
    bb: relax.BlockBuilder, map_: Any, shape: list[Any], starts: list[int], strides: list[int], image: list[int]
) -> Any:
    """A map [B, C, *blocks] on [B, C, *image]: position l of an axis at start + l * stride, zeros elsewhere; None where
    all of it falls outside.
    """
    axes = len(image)
    for a, stride in enumerate(strides):
        if stride > 1:
            before, after = math.prod(shape[1 : 3 + a]), math.prod(shape[3 + a :])
            apart = bb.emit(relax.op.reshape(map_, [shape[0], before, 1, after]))
            apart = bb.emit(relax.op.nn.pad(apart, [0, 0, 0, 0, 0, stride - 1, 0, 0]))
            shape = [*shape[: 2 + a], shape[2 + a] * stride, *shape[3 + a :]]
            map_ = bb.emit(relax.op.reshape(apart, shape))
    begin = [max(0, -s) for s in starts]
    end = [min(e, i - s) for e, i, s in zip(shape[2:], image, starts, strict=True)]
    if any(e <= b for b, e in zip(begin, end, strict=True)):
        return None
    cut = bb.emit(relax.op.strided_slice(map_, list(range(2, 2 + axes)), begin, end))
    width = [0, 0, 0, 0]
    for b, e, s, i in zip(begin, end, starts, image, strict=True):
        width += [b + s, i - (b + s) - (e - b)]
    return bb.emit(relax.op.nn.pad(cut, width))
