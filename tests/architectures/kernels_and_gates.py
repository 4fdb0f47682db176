"""Architectures whose mixing of tokens has no softmax over keys: linear attention, gates, kernels.

Letters: B batch, H/W height/width, N tokens, C channels, nH heads, d head_dim. All take an image [B, 3, H, W].
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.architectures.frame import BOTH, Architecture


class CareTransformer(nn.Module):
    """CARE Transformer: channels split unevenly, linear attention on one part, depthwise convolutions on the other,
    the two mixed by a dual interaction with a memory that the blocks pass on (arXiv 2411.16170).
    """

    def __init__(self, dim: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.memory = nn.Parameter(torch.randn(1, dim // 4, 1, 1))
        self.blocks = nn.ModuleList(CareBlock(dim) for _ in range(depth))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        memory = self.memory.expand(x.shape[0], -1, x.shape[2], x.shape[3])
        for block in self.blocks:
            x, memory = block(x, memory)
        return x


class CareBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wide, self.narrow = dim * 3 // 4, dim // 4
        self.qkv = nn.Conv2d(self.narrow, 3 * self.narrow, 1)
        self.near = nn.Conv2d(self.wide, self.wide, 3, padding=1, groups=self.wide)
        self.tall = nn.Conv2d(self.wide, self.wide, (7, 1), padding=(3, 0), groups=self.wide)
        self.interact = nn.Sequential(nn.Conv2d(dim + dim // 4, dim, 1), nn.BatchNorm2d(dim), nn.GELU())
        self.out = nn.Conv2d(dim, dim + dim // 4, 1)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide, narrow = x.split([self.wide, self.narrow], dim=1)
        query, key, value = (t.flatten(2) for t in self.qkv(narrow).chunk(3, dim=1))  # [B, C, N]
        query, key = F.elu(query) + 1, F.elu(key) + 1
        summary = key @ value.transpose(1, 2)  # [B, C, C]
        norm = query.transpose(1, 2) @ key.sum(dim=2, keepdim=True) + 1e-6  # [B, N, 1]
        far = ((query.transpose(1, 2) @ summary) / norm).transpose(1, 2).reshape(narrow.shape)
        near = self.near(wide) + self.tall(wide)
        mixed = self.interact(torch.cat([near, far, memory], dim=1))
        update, gate = self.out(mixed).split([x.shape[1], memory.shape[1]], dim=1)
        return x + update, memory * torch.sigmoid(gate)


class EfficientLocalAttention(nn.Module):
    """ELA: mean over rows and over columns, a 1-D convolution and a sigmoid gate each (arXiv 2403.01123)."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.conv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim, bias=False)
        self.norm = nn.GroupNorm(16, dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        rows = torch.sigmoid(self.norm(self.conv(x.mean(dim=3)))).unsqueeze(3)
        columns = torch.sigmoid(self.norm(self.conv(x.mean(dim=2)))).unsqueeze(2)
        return x * rows * columns


class SoftmaxFree(nn.Module):
    """SOFT: a Gaussian kernel of query and key distances in place of the softmax, through landmark tokens pooled by a
    convolution and a Newton iteration for the inverse (arXiv 2110.11945).
    """

    def __init__(self, dim: int = 24, num_heads: int = 3, iterations: int = 3) -> None:
        super().__init__()
        self.num_heads, self.iterations = num_heads, iterations
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.query, self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.pool = nn.Conv2d(dim // num_heads, dim // num_heads, 3, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        batch, dim, height, width = x.shape
        head_dim = dim // self.num_heads
        tokens = x.flatten(2).transpose(1, 2)
        query, value = (
            linear(tokens).reshape(batch, -1, self.num_heads, head_dim).transpose(1, 2)
            for linear in (self.query, self.value)
        )
        maps = query.transpose(2, 3).reshape(batch * self.num_heads, head_dim, height, width)
        landmarks = self.pool(maps).reshape(batch, self.num_heads, head_dim, -1).transpose(2, 3)
        left = self.kernel(query, landmarks)
        middle = self.kernel(landmarks, landmarks)
        x = left @ (self.inverse(middle) @ (left.transpose(2, 3) @ value))
        return self.proj(x.transpose(1, 2).reshape(batch, -1, dim))

    def kernel(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """exp(-|a - b|^2 / 2 sqrt(d)) of every pair of tokens."""
        distance = (one**2).sum(3)[..., None] + (other**2).sum(3)[..., None, :] - 2 * one @ other.transpose(2, 3)
        return torch.exp(-distance / (2 * one.shape[-1] ** 0.5))

    def inverse(self, matrix: torch.Tensor) -> torch.Tensor:
        guess = matrix / matrix.abs().sum(-1).amax(-1)[..., None, None] ** 2
        for _ in range(self.iterations):
            guess = 2 * guess - guess @ matrix @ guess
        return guess


ARCHITECTURES = (
    Architecture("CARE Transformer", CareTransformer, (1, 3, 48, 64), exporters=BOTH),
    Architecture("ELA", EfficientLocalAttention, (1, 3, 48, 64)),
    Architecture("Softmax-free (SOFT)", SoftmaxFree, (1, 3, 48, 72)),
)
