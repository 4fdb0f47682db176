"""Attention over the k x k neighbourhood of every pixel, written with unfold: k^2 copies of keys and values.

Source: Ramachandran et al., "Stand-Alone Self-Attention in Vision Models", NeurIPS 2019, arXiv 1906.05909; the unfold
(Im2Col) form is the baseline of Slide-Transformer, arXiv 2304.04237. Neighbours outside the map are zero vectors that
take part in the softmax. Letters: B batch, H/W height/width, C channels, nH heads, d head_dim, K = kernel_size^2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from .common import softmax

Contraction = Literal["matmul", "einsum", "sum"]


class UnfoldAttention(nn.Module):
    """`[B, C, H, W] -> [B, C, H, W]`, with 1 x 1 convolutions for query, key, value and the projection.

    contraction: how the sums over d and over K are written; relative_bias: a learned bias per head and neighbour.
    """

    def __init__(
        self,
        dim: int = 96,
        num_heads: int = 3,
        kernel_size: int = 3,
        dilation: int = 1,
        *,
        relative_bias: bool = False,
        contraction: Contraction = "matmul",
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.kernel_size, self.dilation = kernel_size, dilation
        self.contraction, self.softmax_dtype = contraction, softmax_dtype
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.bias = nn.Parameter(torch.zeros(num_heads, kernel_size**2)) if relative_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        q, k, v = self.qkv(x).chunk(3, dim=1)
        query = q.reshape(-1, self.num_heads, self.head_dim, height * width) * self.head_dim**-0.5
        attended = self.attend(query, self.neighbours(k), self.neighbours(v))
        return self.proj(attended.reshape(-1, self.num_heads * self.head_dim, height, width))

    def neighbours(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W] -> [B, nH, d, K, H*W]`."""
        padding = self.dilation * (self.kernel_size // 2)
        columns = F.unfold(x, self.kernel_size, dilation=self.dilation, padding=padding)
        return columns.reshape(-1, self.num_heads, self.head_dim, self.kernel_size**2, columns.shape[-1])

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query `[B, nH, d, H*W]`, key and value `[B, nH, d, K, H*W]` -> `[B, nH, d, H*W]`."""
        if self.contraction == "sum":
            weights = self.weights((query[:, :, :, None] * key).sum(2), axis=2)
            return (weights[:, :, None] * value).sum(3)
        if self.contraction == "einsum":
            weights = self.weights(torch.einsum("bhdp,bhdjp->bhjp", query, key), axis=2)
            return torch.einsum("bhjp,bhdjp->bhdp", weights, value)
        query = query.permute(0, 1, 3, 2).unsqueeze(3)  # [B, nH, H*W, 1, d]
        weights = self.weights(query @ key.permute(0, 1, 4, 2, 3), axis=4)  # [B, nH, H*W, 1, K]
        return (weights @ value.permute(0, 1, 4, 3, 2)).squeeze(3).transpose(2, 3)

    def weights(self, logits: torch.Tensor, axis: int) -> torch.Tensor:
        """Softmax over the neighbours, which lie along `axis` of the logits `[B, nH, ...]`."""
        if self.bias is not None:
            logits = logits + self.bias.reshape(
                [1, self.num_heads] + [-1 if a == axis else 1 for a in range(2, logits.ndim)]
            )
        return softmax(logits, axis, self.softmax_dtype)


class UnfoldNet(nn.Module):
    """A small classifier: a convolution of stride 4, residual blocks of unfold attention, and a linear head."""

    def __init__(
        self,
        dim: int = 96,
        num_heads: int = 3,
        kernel_sizes: tuple[int, ...] = (3, 5, 7),
        dilations: tuple[int, ...] = (1, 1, 2),
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.ModuleList(
            UnfoldAttention(dim, num_heads, k, dilation, relative_bias=True)
            for k, dilation in zip(kernel_sizes, dilations, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in kernel_sizes)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x.mean(dim=(2, 3)))
