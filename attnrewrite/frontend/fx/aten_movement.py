"""ATen operators that move data, as ONNX operators; `building.entry` says how an entry is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnrewrite.dims import Dim, Shape, static
from attnrewrite.frontend.fx.building import Builder, Opaque, Results, Table, entry, plain
from attnrewrite.graph import Value

MOVEMENT: Table = {}

# Positions that are written out, for views of any strides and for indices of several axes.
POSITIONS_LIMIT = 1 << 22


@entry(MOVEMENT, "view", "_unsafe_view", "_reshape_alias", "reshape", "unsqueeze", "squeeze", "squeeze.dim")
@entry(MOVEMENT, "squeeze.dims", "flatten.using_ints", "unflatten.int")
def reshape(write: Builder, x: Value, **target: Any) -> Value:
    return write.reshape(x, write.shape)


@entry(MOVEMENT, "alias", "detach", "lift_fresh", "lift_fresh_copy", "lift", "clone", "contiguous")
@entry(MOVEMENT, "resolve_conj", "resolve_neg", "positive")
def identity(write: Builder, x: Value, **how: Any) -> Value:
    return write.same(x)


@entry(MOVEMENT, "_to_copy", "to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as")
@entry(MOVEMENT, "prims.convert_element_type.default")
def cast(write: Builder, x: Value, **target: Any) -> Value:
    return write.same(x) if x.dtype == write.dtype else write.cast(x, write.dtype)


@entry(MOVEMENT, "expand", "expand_as")
def expand(write: Builder, x: Value, **target: Any) -> Value:
    return write.expand(x, write.shape)


@entry(MOVEMENT, "permute")
def permute(write: Builder, x: Value, dims: Sequence[int]) -> Value:
    return write.transpose(x, [d % len(x.known_shape) for d in dims])


@entry(MOVEMENT, "transpose.int")
def transpose(write: Builder, x: Value, dim0: int, dim1: int) -> Value:
    axes = list(range(len(x.known_shape)))
    if axes:
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return write.transpose(x, axes)


@entry(MOVEMENT, "t", "mT", "mH", "adjoint")
def swap_last(write: Builder, x: Value) -> Value:
    rank = len(x.known_shape)
    return write.transpose(x, [*range(rank - 2), rank - 1, rank - 2]) if rank >= 2 else write.same(x)


@entry(MOVEMENT, "slice.Tensor")
def slice_(write: Builder, x: Value, dim: int, start: Any, end: Any, step: Any) -> Value:
    dim %= len(x.known_shape)
    extent = x.known_shape[dim]
    start, end, step = 0 if start is None else start, (1 << 63) - 1 if end is None else end, plain(step)
    if isinstance(extent, int) and isinstance(start, int) and isinstance(end, int):
        start, end, _ = slice(start, end, step).indices(extent)
        end = max(start, end)
    sliced = write.sliced(x, dim, start, end, step, write.shape[dim])
    return write.same(x) if sliced is x else sliced


@entry(MOVEMENT, "select.int")
def select(write: Builder, x: Value, dim: int, index: Any) -> Value:
    return write.taken(x, np.array(plain(index)), dim % len(x.known_shape))


def _split(write: Builder, x: Value, dim: int, shapes: Sequence[Shape]) -> list[Value]:
    """Parts of these shapes along an axis."""
    if any(isinstance(shape[dim], Dim) for shape in shapes):
        raise Opaque("a split of a symbolic axis")
    if len(shapes) == 1:
        return [write.same(x)]
    sizes = write.ints([static(shape[dim]) for shape in shapes])
    return write.nodes("Split", [x, sizes], shapes, x.dtype, axis=dim)


@entry(MOVEMENT, "split.Tensor", "split_with_sizes", "chunk", "split.sizes", "unsafe_split.Tensor", "unsafe_chunk")
@entry(MOVEMENT, "tensor_split.sections", "tensor_split.indices", "unsafe_split_with_sizes")
def split(write: Builder, x: Value, dim: int, **sizes: Any) -> Results:
    return _split(write, x, dim % len(x.known_shape), write.shapes)


@entry(MOVEMENT, "unbind.int")
def unbind(write: Builder, x: Value, dim: int) -> Results:
    dim %= len(x.known_shape)
    parts = _split(write, x, dim, [(*shape[:dim], 1, *shape[dim:]) for shape in write.shapes])
    return [write.reshape(part, shape) for part, shape in zip(parts, write.shapes, strict=True)]


@entry(MOVEMENT, "cat", "concat", "concatenate")
def cat(write: Builder, tensors: Sequence[Value], dim: int) -> Value:
    parts = [v for v in tensors if v.shape != (0,)] or list(tensors)  # torch passes over empty vectors
    if len(parts) == 1:
        return write.same(write.cast(parts[0], write.dtype))
    return write.op(
        "Concat", [write.cast(v, write.dtype) for v in parts], write.shape, write.dtype, axis=dim % len(write.shape)
    )


@entry(MOVEMENT, "stack")
def stack(write: Builder, tensors: Sequence[Value], dim: int) -> Value:
    dim %= len(write.shape)
    one = (*write.shape[:dim], 1, *write.shape[dim + 1 :])
    parts = [write.reshape(write.cast(v, write.dtype), one) for v in tensors]
    return write.op("Concat", parts, write.shape, write.dtype, axis=dim)


@entry(MOVEMENT, "roll")
def roll(write: Builder, x: Value, shifts: Sequence[int], dims: Sequence[int]) -> Value:
    """out[..., i, ...] = x[..., (i - shift) mod extent, ...]; without axes, of the flattened tensor."""
    flat = x if dims else write.reshape(x, (_elements(x),))
    rolled = flat
    for shift, dim in zip(shifts, dims or [0], strict=True):
        axis = dim % len(rolled.known_shape)
        extent = plain(rolled.known_shape[axis])
        if extent == 0 or plain(shift) % extent == 0:
            continue
        cut = extent - shift % extent
        halves = [write.slice(rolled, [axis], [start], [end]) for start, end in ((cut, extent), (0, cut))]
        rolled = write.concat(halves, axis) if isinstance(rolled.known_shape[axis], int) else rolled
    rolled = write.reshape(rolled, x.known_shape)
    return write.same(x) if rolled is x else rolled


def _elements(x: Value) -> int:
    total = 1
    for extent in x.known_shape:
        total *= plain(extent)
    return total


@entry(MOVEMENT, "flip")
def flip(write: Builder, x: Value, dims: Sequence[int]) -> Value:
    for dim in dims:
        axis = dim % len(x.known_shape)
        bounds = [write.ints([n]) for n in (-1, -(1 << 63) + 1, axis, -1)]
        if x.known_shape[axis] != 1:
            x = write.op("Slice", [x, *bounds], x.known_shape)
    return write.same(x)


def _pads(write: Builder, x: Value, pad: Sequence[Any]) -> tuple[list[int], list[int]]:
    """torch's pads (last axis first, before and after) as one entry per axis."""
    rank = len(x.known_shape)
    before, after = [0] * rank, [0] * rank
    for k in range(len(pad) // 2):
        before[rank - 1 - k], after[rank - 1 - k] = plain(pad[2 * k]), plain(pad[2 * k + 1])
    return before, after


@entry(MOVEMENT, "constant_pad_nd")
def constant_pad_nd(write: Builder, x: Value, pad: Sequence[Any], value: float) -> Value:
    before, after = _pads(write, x, pad)
    fill = write.constant(np.array(value, x.dtype)) if value else None
    padded = write.padded(x, before, after, "constant", fill)
    return write.same(x) if padded is x else padded


def _pad_with(mode: str, *names: str) -> None:
    @entry(MOVEMENT, *names)
    def pad(write: Builder, x: Value, padding: Sequence[Any] = (), **named: Any) -> Value:
        before, after = _pads(write, x, padding or named["pad"])
        if min(*before, *after) < 0:
            raise Opaque("negative padding that is not constant")
        padded = write.padded(x, before, after, mode, None)
        return write.same(x) if padded is x else padded


_pad_with("reflect", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
_pad_with("edge", "replication_pad1d", "replication_pad2d", "replication_pad3d")
_pad_with("wrap", "_pad_circular")


@entry(MOVEMENT, "im2col")
def im2col(
    write: Builder,
    x: Value,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Value:
    """out[b, c * K + t, l] = x[b, c, l * stride + t * dilation - padding] along both axes."""
    rank = len(x.known_shape)
    before = [0] * (rank - 2) + [plain(p) for p in padding]
    image = write.padded(x, before, before, "constant", None)
    rows, columns = (
        np.arange(k)[:, None] * d + np.arange((plain(e) - d * (k - 1) - 1) // s + 1) * s
        for k, d, s, e in zip(kernel_size, dilation, stride, image.known_shape[-2:], strict=True)
    )
    blocks = write.taken(write.taken(image, rows, rank - 2), columns, rank)  # [..., kh, oh, kw, ow]
    moved = write.transpose(blocks, [*range(rank - 2), rank - 2, rank, rank - 1, rank + 1])
    return write.reshape(moved, write.shape)


@entry(MOVEMENT, "col2im")
def col2im(
    write: Builder,
    x: Value,
    output_size: Sequence[Any],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Value:
    own = x.known_shape
    blocks = x if len(own) == 3 else write.reshape(x, (1, *own))
    shape = write.shape if len(own) == 3 else (1, *write.shape)
    sizes = [write.ints([plain(e) for e in output_size]), write.ints(list(kernel_size))]
    pads = [*padding, *padding]
    folded = write.op("Col2Im", [blocks, *sizes], shape, dilations=list(dilation), pads=pads, strides=list(stride))
    return write.reshape(folded, write.shape)


@entry(MOVEMENT, "index.Tensor", "_unsafe_index.Tensor")
def index(write: Builder, x: Value, indices: Sequence[Value | None]) -> Value:
    if any(i is not None and i.dtype == np.dtype(bool) for i in indices):
        raise Opaque("an index of bools that are computed")
    given = {axis: write.cast(i, np.dtype(np.int64)) for axis, i in enumerate(indices) if i is not None}
    if len(given) == 1:
        ((axis, positions),) = given.items()
        return write.op("Gather", [x, positions], write.shape, axis=axis)
    return _index_together(write, x, given)


def _index_together(write: Builder, x: Value, given: dict[int, Value]) -> Value:
    """out[i...] = x[p0[i...], p1[i...], ...]; the broadcast axes stand where the first index stands if the indexed axes
    are neighbours, else in front.
    """
    axes, rank = list(given), len(x.known_shape)
    rest = [k for k in range(rank) if k not in axes]
    broadcast = np.broadcast_shapes(*(tuple(plain(e) for e in p.known_shape) for p in given.values()))
    aligned = [write.reshape(write.expand(p, broadcast), (*broadcast, 1)) for p in given.values()]
    together = write.concat(aligned, len(broadcast))
    moved = write.transpose(x, axes + rest) if axes + rest != list(range(rank)) else x
    shape = (*broadcast, *(x.known_shape[k] for k in rest))
    found = write.op("GatherND", [moved, together], shape)
    if axes != list(range(axes[0], axes[0] + len(axes))) or axes[0] == 0:
        return found
    before, n = axes[0], len(broadcast)
    return write.transpose(found, [*range(n, n + before), *range(n), *range(n + before, len(shape))])


@entry(MOVEMENT, "gather")
def gather(write: Builder, x: Value, dim: int, index: Value) -> Value:
    if not x.known_shape:
        raise Opaque("a gather from a single number")
    return write.op(
        "GatherElements", [x, write.cast(index, np.dtype(np.int64))], write.shape, axis=dim % len(x.known_shape)
    )


@entry(MOVEMENT, "index_select")
def index_select(write: Builder, x: Value, dim: int, index: Value) -> Value:
    if len(index.known_shape) != 1 or not x.known_shape:
        raise Opaque("an index that is no vector")
    return write.op("Gather", [x, index], write.shape, axis=dim % len(x.known_shape))


@entry(MOVEMENT, "embedding")
def embedding(write: Builder, weight: Value, indices: Value, padding_idx: int, scale_grad_by_freq: bool) -> Value:
    return write.op("Gather", [weight, indices], write.shape, axis=0)


@entry(MOVEMENT, "unfold")
def unfold(write: Builder, x: Value, dimension: int, size: int, step: int) -> Value:
    """out[..., n, ..., t] = x[..., n * step + t, ...]."""
    rank = len(x.known_shape)
    if not rank:
        raise Opaque("an unfolded number")
    axis = dimension % rank
    blocks = np.arange(plain(write.shape[axis]))[:, None] * step + np.arange(size)
    taken = write.taken(x, blocks, axis)
    return write.transpose(taken, [k for k in range(rank + 1) if k != axis + 1] + [axis + 1])


@entry(MOVEMENT, "pixel_shuffle")
def pixel_shuffle(write: Builder, x: Value, upscale_factor: int) -> Value:
    shape = write.shape
    image = write.reshape(x, x.known_shape) if len(shape) == 4 else write.reshape(x, (1, *x.known_shape))
    if len(shape) not in (3, 4):
        raise Opaque(f"a pixel shuffle of {len(shape)} axes")
    wide = shape if len(shape) == 4 else (1, *shape)
    return write.reshape(write.op("DepthToSpace", [image], wide, blocksize=upscale_factor, mode="CRD"), shape)


@entry(MOVEMENT, "pixel_unshuffle")
def pixel_unshuffle(write: Builder, x: Value, downscale_factor: int) -> Value:
    *lead, channels, height, width = x.known_shape
    r, n = downscale_factor, len(lead)
    blocks = write.reshape(x, (*lead, channels, height // r, r, width // r, r))
    return write.reshape(write.transpose(blocks, [*range(n + 1), n + 2, n + 4, n + 1, n + 3]), write.shape)


@entry(MOVEMENT, "channel_shuffle", "native_channel_shuffle")
def channel_shuffle(write: Builder, x: Value, groups: int) -> Value:
    batch, channels, *rest = x.known_shape
    apart = write.reshape(x, (batch, groups, channels // groups, *rest))
    return write.reshape(write.transpose(apart, [0, 2, 1, *range(3, 3 + len(rest))]), write.shape)


@entry(MOVEMENT, "repeat", "tile")
def repeat(write: Builder, x: Value, **repeats: Any) -> Value:
    """The axes as often as the results' extents say; what has extent 1 is expanded."""
    times = next(iter(repeats.values()))
    lead = len(write.shape) - len(x.known_shape)
    own = write.reshape(x, (*(1,) * lead, *x.known_shape))
    times = (1,) * (len(write.shape) - len(times)) + tuple(times)
    if all(e == 1 or t == 1 for e, t in zip(own.known_shape, times, strict=True)):
        expanded = write.expand(own, write.shape)
        return write.same(x) if expanded is x else expanded
    return write.op("Tile", [own, write.extents(times)], write.shape)


@entry(MOVEMENT, "slice_scatter")
def slice_scatter(write: Builder, x: Value, src: Value, dim: int, start: Any, end: Any, step: int) -> Value:
    """x with x[..., start:end:step, ...] = src."""
    dim %= len(x.known_shape)
    extent = plain(x.known_shape[dim])
    start, end, _ = slice(start, end, plain(step)).indices(extent)
    positions = range(start, end, step)
    if not positions:
        return write.same(x)
    if len(positions) == extent:
        return write.same(src)
    if step == 1:
        parts = [write.slice(x, [dim], [0], [start])] if start else []
        parts += [src] + ([write.slice(x, [dim], [end], [extent])] if end < extent else [])
        return write.concat(parts, dim)
    written: np.ndarray = np.isin(np.arange(extent), positions)
    source = np.clip((np.arange(extent) - start) // step, 0, len(positions) - 1)
    mask = written.reshape([-1] + [1] * (len(x.known_shape) - dim - 1))
    return write.op("Where", [write.constant(mask), write.taken(src, source, dim), x], x.known_shape, x.dtype)


@entry(MOVEMENT, "select_scatter")
def select_scatter(write: Builder, x: Value, src: Value, dim: int, index: int) -> Value:
    """x with x[..., index, ...] = src."""
    dim %= len(x.known_shape)
    start = plain(index) % plain(x.known_shape[dim])
    one = write.reshape(src, (*x.known_shape[:dim], 1, *x.known_shape[dim + 1 :]))
    return slice_scatter(write, x, one, dim, start, start + 1, 1)


@entry(MOVEMENT, "as_strided")
def as_strided(write: Builder, x: Value, size: Sequence[Any], stride: Sequence[Any], storage_offset: Any) -> Value:
    """out[i...] = x.flatten()[offset + sum(i * stride)] of a tensor that fills its storage."""
    return strided(write, x, size, stride, storage_offset or 0)


@entry(MOVEMENT, "diagonal")
def diagonal(write: Builder, x: Value, offset: int, dim1: int, dim2: int) -> Value:
    """out[..., i] = x[..., i + max(-offset, 0), ..., i + max(offset, 0), ...]."""
    rank = len(x.known_shape)
    dim1, dim2 = dim1 % rank, dim2 % rank
    steps = [1]
    for extent in x.known_shape[:0:-1]:
        steps.insert(0, steps[0] * plain(extent))
    size = [*(e for k, e in enumerate(x.known_shape) if k not in (dim1, dim2)), write.shape[-1]]
    stride = [*(s for k, s in enumerate(steps) if k not in (dim1, dim2)), steps[dim1] + steps[dim2]]
    return strided(write, x, size, stride, max(-offset, 0) * steps[dim1] + max(offset, 0) * steps[dim2])


def strided(write: Builder, x: Value, size: Sequence[Any], stride: Sequence[Any], offset: Any) -> Value:
    """A view of the flattened tensor by strides."""
    positions: np.ndarray = np.array(plain(offset))
    extents = [plain(e) for e in size]
    if np.prod(extents, initial=1) > POSITIONS_LIMIT:
        raise Opaque("a strided view of too many elements")
    for axis, (extent, step) in enumerate(zip(extents, stride, strict=True)):
        along = np.arange(extent) * plain(step)
        positions = positions + along.reshape([-1] + [1] * (len(extents) - axis - 1))
    total = _elements(x)
    if positions.size == total and np.array_equal(positions.reshape(-1), np.arange(total)):
        return write.reshape(x, tuple(extents))
    return write.taken(write.reshape(x, (total,)), positions, 0)


def _triangle(upper: bool) -> None:
    @entry(MOVEMENT, "triu" if upper else "tril")
    def triangle(write: Builder, x: Value, diagonal: int) -> Value:
        rows, columns = (plain(e) for e in x.known_shape[-2:])
        kept = np.tri(rows, columns, diagonal - upper, dtype=bool) ^ upper
        return write.op("Where", [write.constant(kept), x, write.scalar(0, x)], x.known_shape, x.dtype)


_triangle(upper=True)
_triangle(upper=False)


def _filled(number: float | None, *names: str) -> None:
    @entry(MOVEMENT, *names)
    def filled(write: Builder, fill_value: Any = None, **form: Any) -> Value:
        content = fill_value if number is None else number
        if not isinstance(content, (bool, int, float)):
            raise Opaque(f"a tensor filled with {content}")
        scalar = write.constant(np.array(content, write.dtype))
        return write.expand(scalar, write.shape) if write.shape else write.same(scalar)


_filled(None, "full", "new_full", "full_like")
_filled(0, "zeros", "new_zeros", "zeros_like", "empty.memory_format", "new_empty", "empty_like", "new_empty_strided")
_filled(0, "empty_strided", "empty_permuted")
_filled(1, "ones", "new_ones", "ones_like")


@entry(MOVEMENT, "arange", "arange.start", "arange.start_step")
def arange(write: Builder, end: Any, start: Any = 0, step: Any = 1, **form: Any) -> Value:
    """Whole numbers from a start with a step; the end alone may be symbolic."""
    if write.dtype != np.dtype(np.int64) or not all(isinstance(n, (int, Dim)) for n in (start, end, step)):
        raise Opaque("a range of fractions")
    bounds = [write.reshape(write.extents((n,)), ()) for n in (start, end, step)]
    return write.op("Range", bounds, write.shape, write.dtype)
