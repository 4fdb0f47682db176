"""Learned shifts: what a depthwise convolution and a bias per slot do to an operand, taken apart from its tokens.

Slide-Transformer merges a fixed shift and a learned kernel into one depthwise convolution with one filter per channel
and slot. A bias on the keys that differs from slot to slot is kept apart as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.graph import STANDARD_DOMAIN, Value
from attnrewrite.indexing.map import Coordinate, IndexingError, dependencies, reduced
from attnrewrite.indexing.provenance import provenances
from attnrewrite.indexing.rules import broadcast_index
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.contraction import Operand
from attnrewrite.localattention.grid import count
from attnrewrite.localattention.logits import constant_at
from attnrewrite.localattention.maps import SiteMaps


@dataclass(frozen=True, eq=False)
class Shifted:
    """An operand below its learned shifts: element(slot) = sum_t kernel[slot, t] * map[p + off(t)] + bias[slot].

    kernel, bias: arrays over the grid (features and slots), kernel with the taps as one more last axis; None where
    absent. taps, dilation: of the convolution, per spatial axis; None without one.
    """

    operand: Operand
    kernel: np.ndarray | None = None
    bias: np.ndarray | None = None
    taps: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None


def peel_shifts(operand: Operand, attention: Attention, positions: Mapping[Value, int]) -> Shifted:
    """Take a slot-dependent bias and a learned shift convolution off an operand; without either it stays as it is."""
    slot = attention.key_axis
    value, index = operand.value, operand.index
    bias: np.ndarray | None = None
    while True:
        last = None
        for last in provenances(value, index, positions):
            if last.domain is not None:
                break
        node = None if last is None else last.value.producer
        if last is None or node is None or last.domain is not None or node.domain != STANDARD_DOMAIN:
            return _without_convolution(operand, value, index, bias)
        if node.op == "Add" and len([v for v in node.inputs if v is not None and v.is_constant]) == 1:
            data, other = node.required(0), node.required(1)
            data, other = (other, data) if data.is_constant else (data, other)
            added = constant_at(other, broadcast_index(last.index, other))
            if added.ndim <= slot or added.shape[slot] == 1:
                return _without_convolution(operand, value, index, bias)
            bias = added if bias is None else bias + added
            value, index = data, broadcast_index(last.index, data)
            continue
        if node.op == "Conv":
            shifted = _shift_convolution(last.value, last.index, slot)
            if shifted is not None:
                own = shifted.bias if bias is None else bias if shifted.bias is None else bias + shifted.bias
                return replace(shifted, bias=own)
        return _without_convolution(operand, value, index, bias)


def _without_convolution(
    operand: Operand, value: Value, index: tuple[Coordinate, ...], bias: np.ndarray | None
) -> Shifted:
    return Shifted(operand) if bias is None else Shifted(Operand(value, index), bias=bias)


def _shift_convolution(value: Value, index: tuple[Coordinate, ...], slot: int) -> Shifted | None:
    """out[b, o, p] = sum_t weight[o, t] * in[b, o // m, p + off(t)] + bias[o] with the slot numbered by o."""
    node = value.producer
    assert node is not None
    data, weight = node.required(0), node.constant(1)
    if weight is None or data.shape is None or weight.shape[1] != 1 or node.attributes.get("group", 1) != data.shape[1]:
        return None
    spatial = weight.ndim - 2
    dilation = tuple(node.attributes.get("dilations") or [1] * spatial)
    taps = weight.shape[2:]
    same = [d * (k // 2) for k, d in zip(taps, dilation, strict=True)] * 2
    strides = node.attributes.get("strides") or [1] * spatial
    if any(k % 2 == 0 for k in taps) or list(node.attributes.get("pads") or [0] * (2 * spatial)) != same:
        return None
    if any(s != 1 for s in strides) or node.attributes.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    filters = index[1].static("a convolution")
    if filters.shape[slot] == 1:
        return None
    kernel = weight.reshape(weight.shape[0], -1).astype(np.float64)[filters]
    offsets = node.constant(2)
    bias = None if offsets is None else offsets.astype(np.float64)[filters]
    channels = data.shape[1]
    if not isinstance(channels, int):
        return None
    channel = Coordinate(reduced(filters // (weight.shape[0] // channels)))
    read = (index[0], channel, *index[2:])
    if slot in dependencies(read):
        return None  # another channel or place for every slot: the convolution's filters are no slots
    return Shifted(Operand(data, read), kernel, bias, tuple(taps), dilation)


def per_slot(
    array: np.ndarray | None, maps: SiteMaps, channel_axis: int, slots: np.ndarray, taps: tuple[int, ...] | None
) -> np.ndarray | None:
    """[nH*d, K] (or with taps [nH*d, K, *kernel_size]) of an array over features and slots."""
    if array is None:
        return None
    attention = maps.attention
    shape = attention.output_shape
    channels = attention.head_dim if channel_axis == attention.channel_axis else count(shape[channel_axis])
    tail = 0 if taps is None else array.shape[-1]
    axes = [*maps.heads, channel_axis, attention.key_axis]
    extents = [*(count(shape[a]) for a in maps.heads), channels, attention.num_keys]
    order = axes + [a for a in range(attention.grid_rank) if a not in axes]
    rest = [array.shape[a] for a in order[len(axes) :]]
    if any(e != 1 for e in rest):
        raise IndexingError("the shift kernels differ from pixel to pixel")
    last = [] if taps is None else [attention.grid_rank]
    moved = array.transpose(order + last).reshape([array.shape[a] for a in axes] + ([tail] if taps is not None else []))
    full = np.broadcast_to(moved, extents + ([tail] if taps is not None else []))
    flat = full.reshape(math.prod(extents[:-1]), extents[-1], *(() if taps is None else taps))
    return flat[:, slots]
