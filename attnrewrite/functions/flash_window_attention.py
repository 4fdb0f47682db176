"""FlashWindowAttention in standard operators of rank 5 at most.

pad and roll -> windows as rows -> softmax(scale q k^T + bias + mask) v -> merge -> unroll and crop. A partition of any
number of spatial axes goes axis by axis, so no tensor has more axes than [rows, tokens, windows, rest]. Key windows of
their own are gathered, axis by axis too, each pixel once for every window that holds it. Extra tokens stand behind the
window's, as queries as well as keys. Heads with shifts of their own are cut into windows, and put back, group by group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnrewrite.dims import Extent, Shape, static
from attnrewrite.functions.added_logits import relative_logits
from attnrewrite.functions.body import BodyBuilder, softmax_dtype
from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.graph import Graph, Value
from attnrewrite.localattention.geometry import PADDING, Sizes, WindowGeometry


def body(spec: FlashWindowAttention, operands: dict[str, Value], opset: int) -> Graph:
    """The op on these operands (docs/ops.md; `query`, `key`, `value` [B, *S, C] and any of the optional ones).

    With `extra_query` the body has the second output. Raises ValueError where there are shared queries as well.
    """
    b = BodyBuilder(list(operands.values()), opset)
    geometry, heads = spec.geometry, spec.num_heads
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    assert key.shape is not None
    batch, rows = key.shape[0], key.shape[0] * geometry.num_windows
    tokens, keys = geometry.tokens_per_window, geometry.keys_per_window
    if "extra_key" in operands:
        keys += static(operands["extra_key"].known_shape[2])
    asking = 0 if "extra_query" not in operands else static(operands["extra_query"].known_shape[2])
    if asking and spec.shared_query:
        raise ValueError("queries shared by all windows have no extra ones beside them")

    own = _shared(b, query, geometry) if spec.shared_query else _by_shift(b, query, None, spec, _query_windows)
    q = _heads(b, _with_extra(b, own, operands, "query"), heads)
    unscaled = _heads(b, own, heads) if asking and "relative_position" in operands else q
    tokens += asking
    if spec.scale != 1.0:
        q = b.op("Mul", [q, b.scalar(spec.scale, q)], q.known_shape)
    k, v = (
        _heads(
            b,
            _with_extra(b, _by_shift(b, x, operands.get(f"{name}_padding"), spec, _key_windows), operands, name),
            heads,
        )
        for name, x in (("key", key), ("value", value))
    )
    k = b.transpose(k, (0, 1, 3, 2))
    if spec.shared_query:
        per_image = b.reshape(k, (batch, geometry.num_windows, *k.known_shape[1:]))
        q = b.reshape(q, (batch, 1, *q.known_shape[1:]))
        logits = b.op("MatMul", [q, per_image], (batch, geometry.num_windows, heads, tokens, keys))
        logits = b.reshape(logits, (rows, heads, tokens, keys))
    else:
        logits = b.op("MatMul", [q, k], (rows, heads, tokens, keys))
    if "relative_position" in operands:
        table = b.cast(operands["relative_position"], unscaled.dtype or np.dtype(np.float32))
        key_window = geometry.window_size if geometry.keys is None else geometry.keys.window_size
        relative = relative_logits(b, unscaled, table, spec.relative_scale, geometry.window_size, key_window)
        relative = _beside_extra(b, relative, tokens, keys)
        logits = _added(b, logits, relative, (batch, geometry.num_windows, heads, tokens, keys))
    logits = b.cast(logits, softmax_dtype(spec.softmax_dtype, query))
    logits = _with_terms(b, logits, spec, operands, batch)
    weights = b.cast(b.op("Softmax", [logits], logits.known_shape, axis=-1), value.dtype or np.dtype(np.float32))
    value_dim = static(v.known_shape[3])
    attended = b.op("MatMul", [weights, v], (rows, heads, tokens, value_dim))
    attended = b.reshape(b.transpose(attended, (0, 2, 1, 3)), (rows, tokens, heads * value_dim))

    def merge(b: BodyBuilder, x: Value, _: Value | None, own_windows: WindowGeometry) -> Value:
        return _merge(b, x, own_windows, batch)

    if not asking:
        return b.output(_by_shift(b, attended, None, spec, merge))
    own, beside = (b.slice(attended, [1], [s], [e]) for s, e in ((0, tokens - asking), (tokens - asking, tokens)))
    return b.output(
        _by_shift(b, own, None, spec, merge),
        b.reshape(beside, (batch, geometry.num_windows, asking, heads * value_dim)),
    )


def _by_shift(
    b: BodyBuilder,
    x: Value,
    vector: Value | None,
    spec: FlashWindowAttention,
    move: Callable[[BodyBuilder, Value, Value | None, WindowGeometry], Value],
) -> Value:
    """move(b, x, vector, geometry) of [..., nH*d] and a vector [nH*d], for each run of heads with one shift."""
    runs = spec.runs_of_heads()
    if len(runs) == 1:
        return move(b, x, vector, runs[0][1])
    width, start = static(x.known_shape[-1]) // spec.num_heads, 0
    moved = []
    for heads, geometry in runs:
        end = start + heads * width
        part = b.slice(x, [len(x.known_shape) - 1], [start], [end])
        moved.append(move(b, part, None if vector is None else b.slice(vector, [0], [start], [end]), geometry))
        start = end
    return b.concat(moved, len(moved[0].known_shape) - 1)


def _query_windows(b: BodyBuilder, x: Value, padding: Value | None, geometry: WindowGeometry) -> Value:
    """[B, *S, C] -> [B*nW, N, C]; what stands in the padding is asked in vain."""
    return _partition(b, x, geometry)


def _with_extra(b: BodyBuilder, windows: Value, operands: dict[str, Value], name: str) -> Value:
    """Queries, keys or values of windows [B*nW, M, C] and behind them their extra ones: [B*nW, M + T, C]."""
    extra = operands.get(f"extra_{name}")
    if extra is None:
        return windows
    batch, (rows, _, channels) = operands["key"].known_shape[0], windows.known_shape
    count, tokens = static(rows // batch), static(extra.known_shape[2])
    shape = (batch, count, tokens, static(channels))
    if extra.known_shape != shape:
        first = b.ints([batch if isinstance(batch, int) else 1])
        if extra.known_shape[0] != batch and not isinstance(batch, int):  # known only when the model runs
            size = b.op("Shape", [operands["key"]], (len(operands["key"].known_shape),), np.dtype(np.int64))
            first = b.slice(size, [0], [0], [1])
        target = b.concat([first, b.ints([count, tokens, static(channels)])], 0)
        extra = b.op("Expand", [extra, target], shape)
    return b.concat([windows, b.reshape(extra, (rows, tokens, channels))], 1)


def _beside_extra(b: BodyBuilder, term: Value, queries: int, keys: int) -> Value:
    """A term of the window's queries and keys, nothing for the extra ones behind them."""
    shape = term.known_shape
    missing = [queries - static(shape[-2]), keys - static(shape[-1])]
    return b.pad(term, [0] * len(shape), [0] * (len(shape) - 2) + missing)


def _added(b: BodyBuilder, logits: Value, term: Value, by_window: Shape) -> Value:
    """logits [B*nW, nH, N, M] + term, which has the same rows, or B rows for all windows of an image."""
    if term.known_shape == logits.known_shape:
        return b.op("Add", [logits, term], logits.known_shape)
    shape = logits.known_shape
    shared = b.reshape(term, (by_window[0], 1, *by_window[2:]))
    return b.reshape(b.op("Add", [b.reshape(logits, by_window), shared], by_window), shape)


def _shared(b: BodyBuilder, query: Value, geometry: WindowGeometry) -> Value:
    """[B, *window, C] -> [B, N, C]."""
    shape = query.known_shape
    return b.reshape(query, (shape[0], geometry.tokens_per_window, shape[-1]))


def _key_windows(b: BodyBuilder, x: Value, padding: Value | None, geometry: WindowGeometry) -> Value:
    """[B, *key map, C] -> [B*nW, M, C]; padding: what a position outside the map holds, zero if absent."""
    if geometry.keys is None:
        return _partition(b, _padded(b, x, padding, geometry), geometry)
    extents = geometry.keys.feature_size
    tables = [geometry.key_axis_table(axis) for axis in range(len(extents))]
    padded = tuple(e + int((t == PADDING).any()) for e, t in zip(extents, tables, strict=True))
    x = _filled(
        b,
        b.pad(x, [0] * (len(extents) + 2), [0, *(p - e for p, e in zip(padded, extents, strict=True)), 0]),
        padding,
        extents,
        padded,
    )  # one position behind the map is the padding of all windows
    for axis, (table, extent) in enumerate(zip(tables, extents, strict=True), start=1):
        index = np.where(table == PADDING, extent, table).reshape(-1)
        if not np.array_equal(index, np.arange(padded[axis - 1])):
            shape = (*x.known_shape[:axis], len(index), *x.known_shape[axis + 1 :])
            x = b.op("Gather", [x, b.ints(index.tolist())], shape, axis=axis)
    return _partition(
        b, x, WindowGeometry(tuple(t.size for t in tables), geometry.keys.window_size, (0,) * len(tables))
    )


def _roll(b: BodyBuilder, x: Value, shifts: tuple[int, ...], extents: tuple[int, ...]) -> Value:
    """out[p] = x[(p + shift) mod extent] on each spatial axis."""
    for axis, (shift, extent) in enumerate(zip(shifts, extents, strict=True), start=1):
        if shift % extent:
            at = shift % extent
            x = b.concat([b.slice(x, [axis], [at], [extent]), b.slice(x, [axis], [0], [at])], axis)
    return x


def _pad_end(b: BodyBuilder, x: Value, geometry: WindowGeometry) -> Value:
    after = [p - e for p, e in zip(geometry.padded_size, geometry.feature_size, strict=True)]
    return b.pad(x, [0] * (len(after) + 2), [0, *after, 0])


def _padded(b: BodyBuilder, x: Value, vector: Value | None, geometry: WindowGeometry) -> Value:
    """The map padded at the end, its padding holding a vector: x where x is, 0 + vector elsewhere."""
    if vector is None or not geometry.is_padded:
        return x
    return _filled(b, _pad_end(b, x, geometry), vector, geometry.feature_size, geometry.padded_size)


def _filled(b: BodyBuilder, x: Value, vector: Value | None, extents: Sizes, padded: Sizes) -> Value:
    """A map padded with zeros from `extents` to `padded`, the vector added there."""
    if vector is None or extents == padded:
        return x
    assert x.shape is not None and x.dtype is not None and vector.shape is not None
    beyond = np.zeros((), bool)
    for axis, (extent, full) in enumerate(zip(extents, padded, strict=True)):
        past = np.arange(full) >= extent
        beyond = beyond | past.reshape([-1 if a == axis else 1 for a in range(len(extents))])
    outside = b.constant(beyond.astype(x.dtype)[None, ..., None])
    assert outside.shape is not None
    filling = b.op("Mul", [outside, vector], (*outside.shape[:-1], *vector.shape))
    return b.op("Add", [x, filling], x.shape)


def _partition(b: BodyBuilder, x: Value, geometry: WindowGeometry) -> Value:
    """[B, *S, C] -> [B*nW, N, C]; a map that is padded already is taken as it is."""
    shifts = geometry.shift_size
    assert x.shape is not None
    if geometry.shift_padded:
        x = x if tuple(x.shape[1:-1]) == geometry.padded_size else _pad_end(b, x, geometry)
        x = _roll(b, x, shifts, geometry.padded_size)
    elif tuple(x.known_shape[1:-1]) == geometry.feature_size:
        x = _pad_end(b, _roll(b, x, shifts, geometry.feature_size), geometry)
    else:  # padded with a vector before the shift: the shift runs over the map alone
        inner = _crop(b, x, geometry.feature_size)
        x = _replace(b, x, _roll(b, inner, shifts, geometry.feature_size), geometry)
    assert x.shape is not None
    rows, channels = x.shape[0], static(x.shape[-1])
    tokens, rest = 1, _product(geometry.padded_size) * channels
    for window, padded in zip(geometry.window_size, geometry.padded_size, strict=True):
        count, rest = padded // window, rest // padded
        x = b.reshape(x, (rows, tokens, count, window * rest))
        if tokens > 1 and count > 1:
            x = b.transpose(x, (0, 2, 1, 3))
        rows, tokens = rows * count, tokens * window
    return b.reshape(x, (rows, tokens, channels))


def _merge(b: BodyBuilder, x: Value, geometry: WindowGeometry, batch: Extent) -> Value:
    """[B*nW, N, C] -> [B, *S, C]: the partition undone, then shift and padding."""
    channels = static(x.known_shape[-1])
    sizes = list(zip(geometry.window_size, geometry.padded_size, strict=True))
    rows, tokens, rest = batch * geometry.num_windows, geometry.tokens_per_window, channels
    for window, padded in reversed(sizes):
        count = padded // window
        rows, tokens = rows // count, tokens // window
        x = b.reshape(x, (rows, count, tokens, window * rest))
        if tokens > 1 and count > 1:
            x = b.transpose(x, (0, 2, 1, 3))
        rest *= padded
    x = b.reshape(x, (batch, *geometry.padded_size, channels))
    back = tuple(-s for s in geometry.shift_size)
    if geometry.shift_padded:
        return _crop(b, _roll(b, x, back, geometry.padded_size), geometry.feature_size)
    return _roll(b, _crop(b, x, geometry.feature_size), back, geometry.feature_size)


def _crop(b: BodyBuilder, x: Value, extents: tuple[int, ...]) -> Value:
    assert x.shape is not None
    axes = [a for a, e in enumerate(extents, start=1) if x.shape[a] != e]
    return b.slice(x, axes, [0] * len(axes), [extents[a - 1] for a in axes]) if axes else x


def _replace(b: BodyBuilder, padded: Value, inner: Value, geometry: WindowGeometry) -> Value:
    """The padded map with its inside replaced, strip by strip."""
    for axis in range(len(geometry.feature_size), 0, -1):
        assert inner.shape is not None and padded.shape is not None
        start, end = geometry.feature_size[axis - 1], geometry.padded_size[axis - 1]
        if start == end:
            continue
        strip = b.slice(padded, [axis], [start], [end])
        strip = _crop(
            b, strip, tuple(static(e) for e in (*inner.shape[1:axis], end - start, *inner.shape[axis + 1 : -1]))
        )
        inner = b.concat([inner, strip], axis)
    return inner


def _heads(b: BodyBuilder, x: Value, heads: int) -> Value:
    """[R, N, nH*d] -> [R, nH, N, d]."""
    assert x.shape is not None
    rows, tokens, channels = x.shape
    return b.transpose(b.reshape(x, (rows, tokens, heads, channels // heads)), (0, 2, 1, 3))


def _with_terms(
    b: BodyBuilder, logits: Value, spec: FlashWindowAttention, operands: dict[str, Value], batch: Extent
) -> Value:
    """Add bias and mask; what differs between windows is added in a [B, nW, nH, N, N] view."""
    assert logits.shape is not None and logits.dtype is not None
    windows, tokens = spec.geometry.num_windows, spec.geometry.tokens_per_window
    bias, mask = operands.get("bias"), operands.get("mask")
    per_window: list[Value] = []
    dtype = logits.dtype
    if bias is not None:
        bias = b.cast(bias, dtype)
        if bias.known_shape[0] == 1:
            logits = b.op("Add", [logits, bias], logits.shape)
        else:
            per_window.append(bias)
    if mask is not None:
        mask = b.cast(mask, dtype)
        per_window.append(b.reshape(mask, (mask.known_shape[0], 1, *mask.known_shape[1:])))
    if spec.mask_value is not None:
        runs = spec.runs_of_heads()
        labels = np.stack([own.regions() for heads, own in runs for _ in range(heads if len(runs) > 1 else 1)], axis=1)
        shape = (windows, labels.shape[1], tokens, tokens)
        sides = [b.constant(labels[..., :, None]), b.constant(labels[..., None, :])]
        same_region = b.op("Equal", sides, shape, np.dtype(bool))
        nothing, penalty = b.scalar(0.0, logits), b.scalar(spec.mask_value, logits)
        shift = b.op("Where", [same_region, nothing, penalty], shape, logits.dtype)
        per_window.append(_beside_extra(b, shift, *map(static, logits.known_shape[-2:])))
    if "logit_bias" in operands:
        per_window.append(b.cast(operands["logit_bias"], dtype))
    if not per_window:
        return logits
    assert logits.shape is not None
    flat = logits.shape
    view = b.reshape(logits, (batch, windows, *flat[1:]))
    for term in per_window:
        assert view.shape is not None
        view = b.op("Add", [view, term], view.shape)
    return b.reshape(view, flat)


def _product(extents: tuple[int, ...]) -> int:
    return int(np.prod(extents, dtype=np.int64))
