"""The two ops in NumPy, from the equations of docs/ops.md and the tables of the geometries: the oracle of every kernel.

Clarity over speed: keys and values are gathered for every window, or for every pixel and slot. All arithmetic is in
`dtype`, float64 by default; the result is cast to the element type of `query`. Letters as in docs/ops.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention
from attnrewrite.localattention.geometry import PADDING, NeighborhoodGeometry, Sizes

Operands = Mapping[str, np.ndarray]


def softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    """Softmax; NaN where every logit is -inf."""
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - logits.max(axis=axis, keepdims=True))
    normalised: np.ndarray = weights / weights.sum(axis=axis, keepdims=True)
    return normalised


def flash_window_attention(spec: FlashWindowAttention, operands: Operands, dtype: DTypeLike = np.float64) -> np.ndarray:
    """operands: the operands of the op by name, absent ones left out. Returns [B, *S, nH*dv] in the type of query."""
    return window_outputs(spec, operands, dtype)[0]


def window_outputs(
    spec: FlashWindowAttention, operands: Operands, dtype: DTypeLike = np.float64
) -> tuple[np.ndarray, ...]:
    """The outputs of the op: the map, and what extra queries attend, [B, nW, T, nH*dv], where there are such."""
    geometry, heads = spec.geometry, spec.num_heads
    shifted = [own for count, own in spec.runs_of_heads() for _ in range(count)]  # the windows of every head
    pixels, key_pixels = ([getattr(own, which)() for own in shifted] for which in ("pixels", "key_pixels"))
    tokens_of_query = [np.broadcast_to(np.arange(p.shape[1]), p.shape) if spec.shared_query else p for p in pixels]
    query = _windows(operands["query"], tokens_of_query, None, dtype)
    key = _windows(operands["key"], key_pixels, operands.get("key_padding"), dtype)
    value = _windows(operands["value"], key_pixels, operands.get("value_padding"), dtype)

    asked, own = query, key.shape[2]
    query, key, value = (
        _with_extra(x, operands.get(f"extra_{name}")) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    rows = asked.shape[2]

    logits = spec.scale * np.einsum("bwnhi,bwmhi->bwhnm", query, key)
    if "bias" in operands:
        logits = logits + operands["bias"].astype(dtype)
    if "mask" in operands:
        logits = logits + operands["mask"].astype(dtype)[:, None]
    if "logit_bias" in operands:
        logits = logits + operands["logit_bias"].astype(dtype)
    if "relative_position" in operands:
        key_window = geometry.window_size if geometry.keys is None else geometry.keys.window_size
        table = _relative_table(operands["relative_position"].astype(dtype), geometry.window_size, key_window)
        logits[..., :rows, :own] += spec.relative_scale * np.einsum(
            "bwnhi,hnmi->bwhnm", asked, table.repeat(heads // len(table), 0)
        )
    if spec.mask_value is not None:
        crosses = np.stack([own_windows.crosses_regions() for own_windows in shifted], axis=1)
        logits[..., :rows, :own] += np.where(crosses, spec.mask_value, 0.0).astype(dtype)
    tokens = np.einsum("bwhnm,bwmhi->bwnhi", softmax(logits, axis=-1), value)

    batch, *_, channels = operands["value"].shape
    out = np.zeros((batch, int(np.prod(geometry.feature_size)), heads, channels // heads), dtype)
    for head, own_pixels in enumerate(pixels):
        inside = own_pixels != PADDING
        out[:, own_pixels[inside], head] = tokens[:, :, :rows][:, inside, head]
    outputs = [out.reshape(batch, *geometry.feature_size, channels)]
    if "extra_query" in operands:
        outputs.append(tokens[:, :, rows:].reshape(batch, geometry.num_windows, -1, channels))
    return tuple(o.astype(operands["query"].dtype) for o in outputs)


def slide_attention(spec: SlideAttention, operands: Operands, dtype: DTypeLike = np.float64) -> np.ndarray:
    """operands: the operands of the op by name, absent ones left out. Returns [B, nH*dv, *S] in the type of query."""
    if spec.predicted:
        return _predicted(spec, operands, dtype)
    geometry, heads = spec.geometry, spec.num_heads
    query = operands["query"].astype(dtype)
    batch, channels = query.shape[:2]
    query = query.reshape(batch, heads, channels // heads, -1)
    keys, values = (_neighbours(geometry, operands, name, dtype) for name in ("key", "value"))

    keys = keys.reshape(batch, heads, channels // heads, *keys.shape[2:])
    logits = spec.scale * np.einsum("bhip,bhipj->bhpj", query, keys)
    if "bias" in operands:
        bias = operands["bias"].astype(dtype)
        logits = logits + (bias if bias.ndim == 3 else bias[:, None, :])
    if "exclude" in geometry.borders:
        logits = np.where(geometry.pixels() == PADDING, -np.inf, logits)
    values = values.reshape(batch, heads, -1, *values.shape[2:])
    out = np.einsum("bhpj,bhipj->bhip", softmax(logits, axis=-1), values)
    result: np.ndarray = out.reshape(batch, -1, *geometry.feature_size).astype(operands["query"].dtype)
    return result


def _predicted(spec: SlideAttention, operands: Operands, dtype: DTypeLike) -> np.ndarray:
    """SlideAttention with `logits` in place of query and key; [B, nH*dv, *output_size] in the type of value."""
    geometry, heads, rows = spec.geometry, spec.num_heads, spec.rows_per_pixel
    slots, pixels = geometry.keys_per_query, int(np.prod(geometry.feature_size))
    batch, channels = operands["value"].shape[:2]
    weights = spec.scale * operands["logits"].astype(dtype)
    if spec.overlap_add:
        weights = weights.reshape(batch, heads, rows, slots, pixels)
    else:
        weights = weights.reshape(batch, heads, slots, rows, pixels).swapaxes(2, 3)
    if "bias" in operands:
        weights = weights + operands["bias"].astype(dtype)[:, None, :, None]
    if spec.predicted == "logits":
        weights = softmax(weights, axis=3)
    values = _neighbours(geometry, operands, "value", dtype).reshape(batch, heads, -1, pixels, slots)
    parts = np.einsum("bhrjp,bhipj->bhirp", weights, values).reshape(batch, channels, rows, pixels)
    out = np.zeros((batch, channels, *spec.output_size), dtype)
    factors = spec.upsampling or (1,) * len(geometry.feature_size)
    for pixel, at in enumerate(np.ndindex(*geometry.feature_size)):
        for row, place in enumerate(np.ndindex(*(geometry.kernel_size if spec.overlap_add else factors))):
            if spec.overlap_add:
                to = [int(geometry.axis_positions(a)[at[a], place[a]]) for a in range(len(at))]
            else:
                to = [i * f + j for i, f, j in zip(at, factors, place, strict=True)]
            if all(0 <= t < e for t, e in zip(to, spec.output_size, strict=True)):
                at_once: tuple[Any, ...] = (slice(None), slice(None), *to)
                out[at_once] += parts[:, :, row, pixel]
    result: np.ndarray = out.astype(operands["value"].dtype)
    return result


def _windows(
    feature_map: np.ndarray, pixels: list[np.ndarray], padding: np.ndarray | None, dtype: DTypeLike
) -> np.ndarray:
    """[B, *S, nH*d] -> [B, nW, N, nH, d], read at the pixels [nW, N] of each head; a token outside the map is `padding`
    [nH*d], or zero.
    """
    batch, *_, channels = feature_map.shape
    heads = len(pixels)
    flat = feature_map.reshape(batch, -1, heads, channels // heads).astype(dtype)
    outside = (np.zeros(channels, dtype) if padding is None else padding.astype(dtype)).reshape(heads, -1)
    tokens = [
        np.where((own == PADDING)[None, :, :, None], outside[head], flat[:, own, head])
        for head, own in enumerate(pixels)
    ]
    return np.stack(tokens, axis=3)


def _with_extra(windows: np.ndarray, extra: np.ndarray | None) -> np.ndarray:
    """[B, nW, M, nH, d] and [B or 1, nW or 1, T, nH*d] -> [B, nW, M + T, nH, d]."""
    if extra is None:
        return windows
    batch, count, _, heads, channels = windows.shape
    beside = extra.astype(windows.dtype).reshape(*extra.shape[:3], heads, channels)
    return np.concatenate([windows, np.broadcast_to(beside, (batch, count, *beside.shape[2:]))], axis=2)


def _relative_table(table: np.ndarray, window: Sizes, key_window: Sizes) -> np.ndarray:
    """[nH or 1, R, d] -> [nH or 1, N, M, d]: the sum over axes a of the rows [n_a, m_a]."""
    heads, rows, channels = table.shape
    tokens, keys = int(np.prod(window)), int(np.prod(key_window))
    if rows != sum(w * k for w, k in zip(window, key_window, strict=True)):
        return table.reshape(heads, tokens, keys, channels)
    query, key = (np.unravel_index(np.arange(n), sizes) for n, sizes in ((tokens, window), (keys, key_window)))
    total, start = np.zeros((heads, tokens, keys, channels), table.dtype), 0
    for axis, (extent, length) in enumerate(zip(window, key_window, strict=True)):
        total = total + table[:, start + query[axis][:, None] * length + key[axis][None, :]]
        start += extent * length
    return total


def _neighbours(geometry: NeighborhoodGeometry, operands: Operands, name: str, dtype: DTypeLike) -> np.ndarray:
    """[B, C, *key_size] -> [B, C, P, K]: what slot j of every query holds, shifted purely or by learned kernels."""
    feature_map, padding = operands[name], operands.get(f"{name}_padding")
    kernel, bias = operands.get(f"{name}_kernel"), operands.get(f"{name}_bias")
    batch, channels = feature_map.shape[:2]
    pixels = geometry.pixels()  # [P, K]
    flat = feature_map.reshape(batch, channels, -1).astype(dtype)
    outside = np.zeros(channels, dtype) if padding is None else padding.astype(dtype)
    slots: np.ndarray = np.where(pixels == PADDING, outside[:, None, None], flat[:, :, pixels])
    if kernel is not None:
        taps = _row_per_channel(kernel.reshape(*kernel.shape[:2], -1), channels).astype(dtype)  # [C, K, K]
        slots = np.einsum("bcpt,cjt->bcpj", slots, taps)
    if bias is not None:
        slots = slots + _row_per_channel(bias, channels).astype(dtype)[:, None, :]
    return slots


def _row_per_channel(rows: np.ndarray, channels: int) -> np.ndarray:
    """[R, ...] -> [C, ...]: channel c uses row c mod R."""
    per_channel: np.ndarray = rows[np.arange(channels) % rows.shape[0]]
    return per_channel
