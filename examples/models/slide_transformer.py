"""Slide-Transformer: attention over the k x k neighbourhood, the neighbours gathered by depthwise convolutions.

A depthwise convolution with one-hot kernels shifts the map by every offset of the neighbourhood, which replaces unfold;
a second one with learned kernels beside it (the deformed shifting module) makes the offsets flexible. Both are linear
and take the same input, so for inference they merge into one convolution: weights and biases add.

Source: Pan et al., "Slide-Transformer: Hierarchical Vision Transformer with Local Self-Attention", CVPR 2023,
arXiv 2304.04237. Letters: B batch, H/W height/width, C channels, nH heads, d head_dim, K = kernel_size^2.
"""

from __future__ import annotations

import torch
from torch import nn

from .common import ClassifierHead, Mlp, PatchEmbed, PatchMerging, softmax
from .swin import Size, SwinBlock


class DeformedShift(nn.Module):
    """`[B, d, H, W] -> [B, d*K, H, W]`: channel c*K + j is channel c shifted by offset j, plus what was learned."""

    def __init__(self, head_dim: int, kernel_size: int) -> None:
        super().__init__()
        slots, padding = kernel_size**2, kernel_size // 2
        self.shift = nn.Conv2d(head_dim, head_dim * slots, kernel_size, padding=padding, groups=head_dim)
        self.learned = nn.Conv2d(head_dim, head_dim * slots, kernel_size, padding=padding, groups=head_dim)
        one_hot = torch.eye(slots).reshape(slots, 1, kernel_size, kernel_size).repeat(head_dim, 1, 1, 1)
        self.shift.weight = nn.Parameter(one_hot, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shift(x) + self.learned(x)


class SlideAttention(nn.Module):
    """`[B, H, W, C] -> [B, H, W, C]`: every pixel attends its kernel_size x kernel_size neighbourhood, zero outside.

    The heads fold into the batch, so the convolutions act on d channels and all heads share them. The position bias is
    added to the key: it enters the logits multiplied by the query's sum over d. shared_shift: key and value use the
    same convolutions, as the authors' code does; otherwise each has its own.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        *,
        shared_shift: bool = False,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.slots = num_heads, dim // num_heads, kernel_size**2
        self.softmax_dtype = softmax_dtype
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.key_shift = DeformedShift(self.head_dim, kernel_size)
        self.value_shift = self.key_shift if shared_shift else DeformedShift(self.head_dim, kernel_size)
        self.position_bias = nn.Parameter(torch.zeros(1, num_heads, 1, self.slots, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width, channels = x.shape[1:]
        heads, d = self.num_heads, self.head_dim
        # Head h owns channels 3*d*h to 3*d*(h+1): its query, key and value lie together.
        maps = self.qkv(x).permute(0, 3, 1, 2).reshape(-1, 3 * d, height, width)
        query, key, value = maps.split(d, dim=1)
        query = (query * d**-0.5).reshape(-1, heads, d, 1, height, width)
        keys = self.key_shift(key).reshape(-1, heads, d, self.slots, height, width) + self.position_bias
        values = self.value_shift(value).reshape(-1, heads, d, self.slots, height, width)
        weights = softmax((query * keys).sum(2, keepdim=True), 3, self.softmax_dtype)
        attended = (weights * values).sum(3).reshape(-1, channels, height, width)
        return self.proj(attended.permute(0, 2, 3, 1))


class SlideBlock(nn.Module):
    """Slide Attention and MLP, each after LayerNorm and with a residual: `[B, H, W, C] -> [B, H, W, C]`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        *,
        mlp_ratio: float = 4.0,
        shared_shift: bool = False,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SlideAttention(
            dim, num_heads, kernel_size, shared_shift=shared_shift, softmax_dtype=softmax_dtype
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SlideSwin(nn.Module):
    """Swin with Slide Attention in its first stages: image `[B, 3, *image_size]` to logits `[B, num_classes]`.

    The default sizes are Slide-Swin-T's. The stages from `slide_stages` on are Swin's, shifted windows included.
    """

    def __init__(
        self,
        image_size: Size = (224, 224),
        *,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        slide_stages: int = 2,
        kernel_size: int = 3,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        num_classes: int = 1000,
        shared_shift: bool = False,
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
                if stage < slide_stages:
                    layer: nn.Module = SlideBlock(
                        dim,
                        heads,
                        kernel_size,
                        mlp_ratio=mlp_ratio,
                        shared_shift=shared_shift,
                        softmax_dtype=softmax_dtype,
                    )
                else:
                    layer = SwinBlock(
                        dim,
                        (height, width),
                        heads,
                        window_size,
                        shifted=block % 2 == 1,
                        mlp_ratio=mlp_ratio,
                        softmax_dtype=softmax_dtype,
                    )
                layers.append(layer)
        self.layers = nn.Sequential(*layers)
        self.head = ClassifierHead(dim, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(image))


def slide_swin_tiny(image_size: Size = (224, 224), *, shared_shift: bool = False) -> SlideSwin:
    """Slide-Swin-T: Slide Attention with kernel 3 in the first two stages, windows of 7 after them."""
    return SlideSwin(image_size, shared_shift=shared_shift)


def small_slide_swin(
    image_size: Size = (48, 80),
    *,
    kernel_size: int = 3,
    shared_shift: bool = False,
    softmax_dtype: torch.dtype | None = None,
) -> SlideSwin:
    """For tests: Slide Attention on a 12 x 20 map, then two Swin blocks on 6 x 10 (window 4); 3 and 6 heads of 5."""
    return SlideSwin(
        image_size,
        dim=15,
        depths=(2, 2),
        num_heads=(3, 6),
        slide_stages=1,
        kernel_size=kernel_size,
        window_size=4,
        mlp_ratio=2.0,
        num_classes=10,
        shared_shift=shared_shift,
        softmax_dtype=softmax_dtype,
    )
