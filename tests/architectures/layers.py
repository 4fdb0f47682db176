"""What the models of this folder share: the parts around the attention, small.

Letters: B batch, H/W height and width, C channels, N tokens, nH heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import nn


class Attention(nn.Module):
    """Multi-head attention of tokens `[B, N, C]` to those of `context` `[B, M, C]`, or to one another."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.query, self.key_value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        query = self.heads(self.query(x)) * self.head_dim**-0.5
        key, value = (self.heads(t) for t in self.key_value(context).chunk(2, dim=-1))
        weights = torch.softmax(self.logits(query, key), dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, C] -> [B, nH, N, d]`."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def logits(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """`[B, nH, N, d], [B, nH, M, d] -> [B, nH, N, M]`."""
        return query @ key.transpose(-2, -1)


class Mlp(nn.Sequential):
    """Linear, GELU, Linear over the channels: `[..., C] -> [..., C]`."""

    def __init__(self, dim: int, ratio: float = 2.0) -> None:
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Residual(nn.Module):
    """x + layer(norm(x)), the norm a LayerNorm over the last axis."""

    def __init__(self, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(dim), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(self.norm(x))


def block(dim: int, attention: nn.Module) -> nn.Sequential:
    """A transformer block: attention, then an MLP, each with its norm and residual, on `[..., C]`."""
    return nn.Sequential(Residual(dim, attention), Residual(dim, Mlp(dim)))


class ToMap(nn.Module):
    """Image `[B, 3, H, W]` to a channels-last map `[B, H/p, W/p, C]`."""

    def __init__(self, dim: int, patch_size: int = 4, in_channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.proj(image).permute(0, 2, 3, 1)


class OnTokens(nn.Module):
    """A layer of tokens `[B, N, C]`, used on a channels-last map."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1, 2)).reshape(x.shape)


class OnChannelsFirst(nn.Module):
    """A layer of channels-first maps, used on a channels-last one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def network(dim: int, *blocks: nn.Module, patch_size: int = 4, num_classes: int = 5) -> nn.Sequential:
    """Patch embedding, blocks on channels-last maps (the last may change the channels to `dim`), norm, mean, Linear."""
    return nn.Sequential(ToMap(dim, patch_size), *blocks, nn.LayerNorm(dim), Mean(), nn.Linear(dim, num_classes))


class Mean(nn.Module):
    """The mean over all axes between batch and channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1, -2).mean(1)
