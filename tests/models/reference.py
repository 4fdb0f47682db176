"""docs/ops.md in NumPy and float64: what the two ops mean. Shared by the hand-built spellings; no code of the package
but the geometries' tables. Letters: B batch, nH heads, d head_dim, N tokens per window, nW windows, K keys per query.
"""

from __future__ import annotations

import numpy as np

from attnrewrite.localattention.geometry import PADDING, NeighborhoodGeometry, WindowGeometry


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def window_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    geometry: WindowGeometry,
    num_heads: int,
    scale: float,
    *,
    bias: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    key_padding: np.ndarray | None = None,
    value_padding: np.ndarray | None = None,
) -> np.ndarray:
    """Channels-last maps `[B, *S, nH*d]` to `[B, *S, nH*dv]`; bias `[1|nW, nH, N, M]`, mask `[nW, 1|N, M]`.

    A query `[B, *window_size, nH*d]` is the same for every window.
    """
    pixels, key_pixels = geometry.pixels(), geometry.key_pixels()
    shared = query.shape[1:-1] != geometry.feature_size
    tokens_of_query = np.broadcast_to(np.arange(pixels.shape[1]), pixels.shape) if shared else pixels
    q = _windows(_flat(query), tokens_of_query, num_heads, None)
    k = _windows(_flat(key), key_pixels, num_heads, key_padding)
    v = _windows(_flat(value), key_pixels, num_heads, value_padding)
    logits = scale * np.einsum("bwhnd,bwhmd->bwhnm", q, k)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits + mask[:, None]
    tokens = np.einsum("bwhnm,bwhmd->bwnhd", softmax(logits), v)
    batch, *_, channels = value.shape
    out = np.zeros((batch, int(np.prod(geometry.feature_size)), channels))
    inside = pixels != PADDING
    out[:, pixels[inside]] = tokens.reshape(*tokens.shape[:3], -1)[:, inside]
    return out.reshape(batch, *geometry.feature_size, channels)


def _flat(x: np.ndarray) -> np.ndarray:
    """`[B, H, W, C] -> [B, H*W, C]` in float64."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).astype(np.float64)


def _windows(x: np.ndarray, pixels: np.ndarray, num_heads: int, padding: np.ndarray | None) -> np.ndarray:
    """`[B, H*W, C] -> [B, nW, nH, N, d]`, tokens outside the map being `padding` `[C]` or zero."""
    tokens = x[:, np.maximum(pixels, 0)]
    tokens[:, pixels == PADDING] = 0.0 if padding is None else padding
    return np.moveaxis(tokens.reshape(*tokens.shape[:3], num_heads, -1), 3, 2)


def slide_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    geometry: NeighborhoodGeometry,
    num_heads: int,
    scale: float,
    *,
    bias: np.ndarray | None = None,
    key_kernel: np.ndarray | None = None,
    key_bias: np.ndarray | None = None,
    value_kernel: np.ndarray | None = None,
    value_bias: np.ndarray | None = None,
    key_padding: np.ndarray | None = None,
    value_padding: np.ndarray | None = None,
) -> np.ndarray:
    """Channels-first maps `[B, nH*d, H, W]` to `[B, nH*dv, H, W]`; bias `[nH, K]` or `[nH, P, K]`, kernels `[R, K,
    *k]`, biases `[R, K]`, paddings `[C]`.
    """
    batch, channels, *size = query.shape
    q = query.reshape(batch, num_heads, channels // num_heads, -1).astype(np.float64)
    k = _neighbours(key, geometry, key_kernel, key_bias, key_padding).reshape(*q.shape, -1)
    v = _neighbours(value, geometry, value_kernel, value_bias, value_padding)
    v = v.reshape(batch, num_heads, -1, *v.shape[2:])
    logits = scale * np.einsum("bhdp,bhdpj->bhpj", q, k)
    if bias is not None:
        logits = logits + (bias if bias.ndim == 3 else bias[:, None])
    if "exclude" in geometry.borders:
        logits = np.where(geometry.pixels() == PADDING, -np.inf, logits)
    return np.einsum("bhpj,bhdpj->bhdp", softmax(logits), v).reshape(batch, -1, *size)


def _neighbours(
    x: np.ndarray,
    geometry: NeighborhoodGeometry,
    kernel: np.ndarray | None,
    bias: np.ndarray | None,
    padding: np.ndarray | None,
) -> np.ndarray:
    """`[B, C, H, W] -> [B, C, H*W, K]`: every pixel's neighbours, mixed by the shift kernels, plus their biases."""
    pixels = geometry.pixels()
    flat = x.reshape(*x.shape[:2], -1).astype(np.float64)
    outside = 0.0 if padding is None else padding[:, None, None]
    taps = np.where(pixels == PADDING, outside, flat[:, :, np.maximum(pixels, 0)])
    rows = np.arange(x.shape[1])
    if kernel is not None:
        mixing = kernel.reshape(*kernel.shape[:2], -1)[rows % len(kernel)]
        taps = np.einsum("bcpt,cjt->bcpj", taps, mixing)
    return taps if bias is None else taps + bias[rows % len(bias)][:, None]
