"""Data movement as torch functions: the operators that have an indexing rule, in the same order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnrewrite.frontend.evaluate import python_slice
from attnrewrite.frontend.fx.entry import (
    Extent,
    NotInTorch,
    Rule,
    aten,
    axes_of,
    dtype_of,
    index_tensor,
    ints,
    number,
    static_ints,
    text,
)
from attnrewrite.graph import Node


def identity(node: Node, data: Tensor, *_: Any) -> Tensor:
    return data


def reshape(node: Node, data: Tensor, target: np.ndarray) -> Tensor:
    """0 keeps the extent of its axis unless `allowzero`, -1 is what remains."""
    keep = not node.attributes.get("allowzero", 0)
    extents = [data.shape[k] if keep and isinstance(e, int) and e == 0 else e for k, e in enumerate(ints(target))]
    return aten.reshape.default(data, extents)


def flatten(node: Node, data: Tensor) -> Tensor:
    axis = node.attributes.get("axis", 1)
    axis = axis + data.dim() if axis < 0 else axis
    return aten.reshape.default(data, [math.prod(data.shape[:axis]), math.prod(data.shape[axis:])])


def squeeze(node: Node, data: Tensor, axes: np.ndarray | None = None) -> Tensor:
    chosen = axes_of(node, axes, data.dim())
    return aten.squeeze.default(data) if chosen is None else aten.squeeze.dims(data, chosen)


def unsqueeze(node: Node, data: Tensor, axes: np.ndarray | None = None) -> Tensor:
    count = len(node.attributes["axes"] if axes is None else axes)
    for axis in sorted(axes_of(node, axes, data.dim() + count) or []):
        data = aten.unsqueeze.default(data, axis)
    return data


def transpose(node: Node, data: Tensor) -> Tensor:
    return aten.permute.default(data, list(node.attributes.get("perm") or range(data.dim())[::-1]))


def slice_(
    node: Node,
    data: Tensor,
    starts: np.ndarray,
    ends: np.ndarray,
    axes: np.ndarray | None = None,
    steps: np.ndarray | None = None,
) -> Tensor:
    """Bounds are clamped; a negative step counts backwards, which torch knows as a slice that is flipped."""
    begins, limits = ints(starts), ints(ends)
    chosen = range(len(begins)) if axes is None else static_ints(axes)
    strides = [1] * len(begins) if steps is None else static_ints(steps)
    for start, end, axis, step in zip(begins, limits, chosen, strides, strict=True):
        axis %= data.dim()
        if step > 0:
            data = aten.slice.Tensor(data, axis, start, end, step)
            continue
        positions = range(int(data.shape[axis]))[python_slice(int(start), int(end), step, int(data.shape[axis]))]
        if not positions:
            data = aten.slice.Tensor(data, axis, 0, 0)
        else:
            data = aten.flip.default(aten.slice.Tensor(data, axis, positions[-1], positions[0] + 1, -step), [axis])
    return data


def split(node: Node, data: Tensor, sizes: np.ndarray | None = None) -> list[Tensor]:
    """Parts of these extents, or as equal as can be: the last is the smaller one."""
    axis = node.attributes.get("axis", 0)
    if sizes is not None:
        return list(aten.split_with_sizes.default(data, ints(sizes), axis))
    if "split" in node.attributes:
        return list(aten.split_with_sizes.default(data, list(node.attributes["split"]), axis))
    return list(aten.split.Tensor(data, -(-data.shape[axis] // len(node.outputs)), axis))


def concat(node: Node, *parts: Tensor) -> Tensor:
    return aten.cat.default(list(parts), node.attributes["axis"])


def pad(
    node: Node, data: Tensor, pads: np.ndarray, fill: np.ndarray | None = None, axes: np.ndarray | None = None
) -> Tensor:
    """Constant padding, which may be negative, or the element that the mode maps a position to."""
    chosen = range(data.dim()) if axes is None else axes_of(node, axes, data.dim()) or []
    amounts, half = ints(pads), len(ints(pads)) // 2
    mode = text(node.attributes.get("mode", "constant"))
    by_axis = {axis: (amounts[k], amounts[k + half]) for k, axis in enumerate(chosen)}
    if mode == "constant":
        return zero_padded(data, by_axis, 0 if fill is None else number(fill))
    for axis, (before, after) in by_axis.items():
        if before or after:
            positions = _positions(mode, int(before), int(after), int(data.shape[axis]))
            data = aten.index_select.default(data, axis, index_tensor(positions, data))
    return data


def zero_padded(data: Tensor, by_axis: dict[int, tuple[Extent, Extent]], fill: float = 0) -> Tensor:
    """Constant padding (before, after) of some axes."""
    flat: list[Extent] = []
    for axis in range(data.dim() - 1, min(by_axis, default=data.dim()) - 1, -1):
        flat += by_axis.get(axis, (0, 0))
    return aten.constant_pad_nd.default(data, flat, fill) if any(flat) else data


def _positions(mode: str, before: int, after: int, extent: int) -> np.ndarray:
    """Of every position of the padded axis, the one of the data that it shows."""
    at = np.arange(-before, extent + after)
    match mode:
        case "edge":
            return np.clip(at, 0, extent - 1)
        case "wrap":
            return at % extent
        case "reflect" if extent > 1:
            at = at % (2 * (extent - 1))
            return np.where(at < extent, at, 2 * (extent - 1) - at)
        case "reflect":
            return np.zeros_like(at)
    raise NotInTorch(f"Pad of mode {mode}")


def expand(node: Node, data: Tensor, target: np.ndarray) -> Tensor:
    """The broadcast of both shapes: an extent of 1 on either side takes the other's."""
    extents: list[Extent] = [*[1] * max(data.dim() - np.asarray(target).size, 0), *ints(target)]
    own: list[Extent] = [*[1] * (len(extents) - data.dim()), *data.shape]
    return aten.expand.default(
        data, [have if isinstance(e, int) and e in (1, -1) else e for e, have in zip(extents, own, strict=True)]
    )


def tile(node: Node, data: Tensor, repeats: np.ndarray) -> Tensor:
    return aten.repeat.default(data, ints(repeats))


def gather(node: Node, data: Tensor, index: np.ndarray | Tensor) -> Tensor:
    """Negative positions count from the end. A constant vector is a selection, which is quicker than indexing."""
    axis = node.attributes.get("axis", 0) % data.dim()
    if isinstance(index, Tensor):
        return aten.index.Tensor(data, [None] * axis + [index])
    if index.ndim == 0:
        return aten.select.int(data, axis, ints(index)[0])
    positions = np.asarray(static_ints(index), np.int64)
    if (positions < 0).any():
        positions = np.where(positions < 0, positions + int(data.shape[axis]), positions)
    found = aten.index_select.default(data, axis, index_tensor(positions, data))
    if index.ndim == 1:
        return found
    return aten.reshape.default(found, [*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]])


def gather_nd(node: Node, data: Tensor, index: Tensor) -> Tensor:
    batched, depth = node.attributes.get("batch_dims", 0), int(index.shape[-1])
    picked: list[Tensor] = []
    for axis in range(batched):
        own = aten.arange.default(data.shape[axis], dtype=torch.int64, device=data.device)
        shape = [1] * (index.dim() - 1)
        shape[axis] = -1
        picked.append(aten.reshape.default(own, shape))
    picked += [aten.select.int(index, -1, k) for k in range(depth)]
    return aten.index.Tensor(data, picked)


def gather_elements(node: Node, data: Tensor, index: Tensor) -> Tensor:
    axis = node.attributes.get("axis", 0)
    return aten.gather.default(data, axis, aten.remainder.Scalar(index, data.shape[axis]))


def scatter_elements(node: Node, data: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = node.attributes.get("axis", 0), text(node.attributes.get("reduction", "none"))
    index = aten.remainder.Scalar(index, data.shape[axis])
    if reduction == "none":
        return aten.scatter.src(data, axis, index, updates)
    if reduction == "add":
        return aten.scatter_add.default(data, axis, index, updates)
    name = {"mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return aten.scatter_reduce.two(data, axis, index, updates, name)


def scatter_nd(node: Node, data: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    reduction = text(node.attributes.get("reduction", "none"))
    if reduction not in ("none", "add"):
        raise NotInTorch(f"ScatterND with the reduction {reduction}")
    at = [aten.select.int(index, -1, k) for k in range(int(index.shape[-1]))]
    return aten.index_put.default(data, at, updates, reduction == "add")


def space_to_depth(node: Node, data: Tensor) -> Tensor:
    batch, channels, height, width = data.shape
    size = node.attributes["blocksize"]
    blocks = aten.reshape.default(data, [batch, channels, height // size, size, width // size, size])
    moved = aten.permute.default(blocks, [0, 3, 5, 1, 2, 4])
    return aten.reshape.default(moved, [batch, channels * size**2, height // size, width // size])


def depth_to_space(node: Node, data: Tensor) -> Tensor:
    batch, channels, height, width = data.shape
    size = node.attributes["blocksize"]
    if text(node.attributes.get("mode", "DCR")) == "CRD":
        return aten.pixel_shuffle.default(data, size)
    blocks = aten.reshape.default(data, [batch, size, size, channels // size**2, height, width])
    moved = aten.permute.default(blocks, [0, 3, 4, 1, 5, 2])
    return aten.reshape.default(moved, [batch, channels // size**2, height * size, width * size])


def col2im(node: Node, data: Tensor, image: np.ndarray, block: np.ndarray) -> Tensor:
    """Overlap-add of blocks; one spatial axis is two with an extent of 1, uneven pads are cropped afterwards."""
    extents, kernel = ints(image), static_ints(block)
    if len(extents) > 2:
        raise NotInTorch("Col2Im of more than two spatial axes")
    rank, missing = len(extents), 2 - len(extents)
    strides, dilations = (list(node.attributes.get(k) or [1] * rank) for k in ("strides", "dilations"))
    pads = list(node.attributes.get("pads") or [0] * (2 * rank))
    padded = [e + b + a for e, b, a in zip(extents, pads[:rank], pads[rank:], strict=True)]
    one = [1] * missing
    folded = aten.col2im.default(data, one + padded, one + kernel, one + dilations, [0, 0], one + strides)
    crop = {2 + missing + k: (-pads[k], -pads[rank + k]) for k in range(rank)}
    folded = zero_padded(folded, crop)
    return aten.squeeze.dim(folded, 2) if missing else folded


def where(node: Node, condition: Tensor, a: Any, b: Any) -> Tensor:
    match isinstance(a, Tensor), isinstance(b, Tensor):
        case True, False:
            return aten.where.ScalarOther(condition, a, b)
        case False, True:
            return aten.where.ScalarSelf(condition, a, b)
    return aten.where.self(condition, a, b)


def range_(node: Node, start: np.ndarray, limit: np.ndarray, delta: np.ndarray, *, device: torch.device) -> Tensor:
    dtype = dtype_of(node.output.dtype) if node.output.dtype is not None else None
    first, last, step = (n.reshape(-1)[0] for n in (start, limit, delta))
    if dtype is None:
        dtype = dtype_of(start.dtype) if start.dtype != object else torch.int64
    plain: Sequence[Any] = [n.item() if isinstance(n, np.generic) else n for n in (first, last, step)]
    return aten.arange.start_step(*plain, dtype=dtype, device=device)


def constant_of_shape(node: Node, shape: np.ndarray, *, device: torch.device) -> Tensor:
    fill = np.asarray(node.attributes.get("value", np.zeros(1, np.float32)))
    return aten.full.default(ints(shape), fill.reshape(-1)[0].item(), dtype=dtype_of(fill.dtype), device=device)


def trilu(node: Node, data: Tensor, diagonal: np.ndarray | None = None) -> Tensor:
    k = 0 if diagonal is None else int(number(diagonal))
    return aten.triu.default(data, k) if node.attributes.get("upper", 1) else aten.tril.default(data, k)


TABLE: dict[str, Rule] = {
    "Identity": Rule(identity),
    "Dropout": Rule(identity, contents=(1, 2)),
    "Reshape": Rule(reshape, contents=(1,)),
    "Flatten": Rule(flatten),
    "Squeeze": Rule(squeeze, contents=(1,)),
    "Unsqueeze": Rule(unsqueeze, contents=(1,)),
    "Transpose": Rule(transpose),
    "Slice": Rule(slice_, contents=(1, 2, 3, 4)),
    "Split": Rule(split, contents=(1,)),
    "Concat": Rule(concat),
    "Pad": Rule(pad, contents=(1, 2, 3)),
    "Expand": Rule(expand, contents=(1,)),
    "Tile": Rule(tile, contents=(1,)),
    "Gather": Rule(gather),
    "GatherND": Rule(gather_nd),
    "GatherElements": Rule(gather_elements),
    "ScatterElements": Rule(scatter_elements),
    "ScatterND": Rule(scatter_nd),
    "SpaceToDepth": Rule(space_to_depth),
    "DepthToSpace": Rule(depth_to_space),
    "Col2Im": Rule(col2im, contents=(1, 2)),
    "Where": Rule(where, numbers=(1, 2)),
    "Range": Rule(range_, contents=(0, 1, 2), device=True),
    "ConstantOfShape": Rule(constant_of_shape, contents=(0,), device=True),
    "Trilu": Rule(trilu, contents=(1,)),
}
