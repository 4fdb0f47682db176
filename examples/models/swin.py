"""Swin Transformer: attention inside windows, every second block with the windows shifted.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021,
arXiv 2103.14030. Letters: B batch, H/W feature-map height/width, C channels, N tokens per window, nW windows, nH heads,
d head_dim.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .common import ClassifierHead, Mlp, PatchEmbed, PatchMerging, softmax

Size = tuple[int, int]


def window_partition(x: torch.Tensor, window: Size) -> torch.Tensor:
    """`[B, H, W, C] -> [B*nW, N, C]`; H and W are multiples of the window's sides."""
    height, width, channels = x.shape[1:]
    rows, columns = window
    x = x.reshape(-1, height // rows, rows, width // columns, columns, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, channels)


def window_merge(windows: torch.Tensor, window: Size, padded: Size) -> torch.Tensor:
    """The inverse of `window_partition`: `[B*nW, N, C] -> [B, *padded, C]`."""
    (rows, columns), (height, width), channels = window, padded, windows.shape[-1]
    x = windows.reshape(-1, height // rows, width // columns, rows, columns, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def relative_position_index(window: Size) -> torch.Tensor:
    """int64 `[N, N]`: for each query and key token of a window, the bias table's row of their relative position."""
    tokens = torch.cartesian_prod(torch.arange(window[0]), torch.arange(window[1]))
    offset = tokens[:, None, :] - tokens[None, :, :]
    return (offset[..., 0] + window[0] - 1) * (2 * window[1] - 1) + offset[..., 1] + window[1] - 1


def shift_mask(padded: Size, window: Size, shift: Size) -> torch.Tensor:
    """float32 `[nW, N, N]`: -100 where query and key were brought together only by the cyclic shift, else 0."""
    labels = torch.zeros(1, *padded, 1)
    for axis, (extent, step) in enumerate(zip(padded, shift, strict=True), start=1):
        wrapped = torch.arange(extent) >= extent - step
        labels = labels + (3 - axis) * wrapped.reshape([-1 if a == axis else 1 for a in range(4)])
    tokens = window_partition(labels, window).squeeze(-1)
    return torch.where(tokens[:, :, None] == tokens[:, None, :], 0.0, -100.0)


class WindowAttention(nn.Module):
    """Multi-head self-attention with relative position bias: tokens `[B*nW, N, C] -> [B*nW, N, C]`."""

    bias_index: torch.Tensor

    def __init__(self, dim: int, window: Size, num_heads: int, softmax_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.softmax_dtype = num_heads, dim // num_heads, softmax_dtype
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads))
        self.register_buffer("bias_index", relative_position_index(window), persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        tokens, heads = x.shape[1], self.num_heads
        q, k, v = self.qkv(x).reshape(-1, tokens, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        logits = logits + self.bias_table[self.bias_index].permute(2, 0, 1)
        if mask is not None:
            windows = mask.shape[0]
            logits = logits.reshape(-1, windows, heads, tokens, tokens) + mask[None, :, None]
            logits = logits.reshape(-1, heads, tokens, tokens)
        attended = softmax(logits, -1, self.softmax_dtype) @ v
        return self.proj(attended.transpose(1, 2).reshape(-1, tokens, heads * self.head_dim))


class SwinBlock(nn.Module):
    """Window attention and MLP, each after LayerNorm and with a residual: `[B, H, W, C] -> [B, H, W, C]`.

    The window shrinks to the map where the map is smaller, and an axis that one window covers is not shifted. A map
    that is not a multiple of the window is padded with zeros, which take part as keys. pad_first: pad, then shift (as
    torchvision and transformers do); otherwise shift, then pad (as timm does).
    """

    mask: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        feature_size: Size,
        num_heads: int,
        window_size: int,
        shifted: bool,
        *,
        mlp_ratio: float = 4.0,
        pad_first: bool = True,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = feature_size
        self.feature_size, self.pad_first = feature_size, pad_first
        self.window = (min(window_size, height), min(window_size, width))
        rows, columns = self.window
        self.shift = (rows // 2 if shifted and height > rows else 0, columns // 2 if shifted and width > columns else 0)
        self.padded = (height + -height % self.window[0], width + -width % self.window[1])
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, self.window, num_heads, softmax_dtype)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        mask = shift_mask(self.padded, self.window, self.shift) if any(self.shift) else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Shift, partition, attend, merge and shift back: `[B, H, W, C] -> [B, H, W, C]`."""
        x = self.roll(self.pad(x), -1) if self.pad_first else self.pad(self.roll(x, -1))
        windows = self.attention(window_partition(x, self.window), self.mask)
        x = window_merge(windows, self.window, self.padded)
        return self.crop(self.roll(x, +1)) if self.pad_first else self.roll(self.crop(x), +1)

    def roll(self, x: torch.Tensor, direction: int) -> torch.Tensor:
        if not any(self.shift):
            return x
        return torch.roll(x, (direction * self.shift[0], direction * self.shift[1]), dims=(1, 2))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        if self.padded == self.feature_size:
            return x
        (height, width), (padded_height, padded_width) = self.feature_size, self.padded
        return F.pad(x, (0, 0, 0, padded_width - width, 0, padded_height - height))

    def crop(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.padded == self.feature_size else x[:, : self.feature_size[0], : self.feature_size[1]]


class Swin(nn.Module):
    """Image `[B, 3, *image_size]` to class logits `[B, num_classes]`; the default sizes are Swin-T's."""

    def __init__(
        self,
        image_size: Size = (224, 224),
        *,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        num_classes: int = 1000,
        pad_first: bool = True,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = (-(-extent // patch_size) for extent in image_size)
        layers: list[nn.Module] = [PatchEmbed(dim, patch_size)]
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            if stage:
                layers.append(PatchMerging(dim))
                dim, height, width = 2 * dim, -(-height // 2), -(-width // 2)
            for block in range(depth):
                layers.append(
                    SwinBlock(
                        dim,
                        (height, width),
                        heads,
                        window_size,
                        shifted=block % 2 == 1,
                        mlp_ratio=mlp_ratio,
                        pad_first=pad_first,
                        softmax_dtype=softmax_dtype,
                    )
                )
        self.layers = nn.Sequential(*layers)
        self.head = ClassifierHead(dim, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(image))


def small_swin(
    image_size: Size = (64, 96), *, pad_first: bool = True, softmax_dtype: torch.dtype | None = None
) -> Swin:
    """For tests: two stages of two blocks, maps of 16 x 24 and 8 x 12 at the default size, window 4, heads of 5."""
    return Swin(
        image_size,
        dim=15,
        depths=(2, 2),
        num_heads=(3, 6),
        window_size=4,
        mlp_ratio=2.0,
        num_classes=10,
        pad_first=pad_first,
        softmax_dtype=softmax_dtype,
    )
