"""Swin's children: windows and shifted windows inside other networks.

Letters: B batch, H/W height and width, C channels, N tokens per window, nW windows, nH heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from examples.models.common import PatchMerging
from examples.models.swin import (
    Size,
    SwinBlock,
    relative_position_index,
    shift_mask,
    window_merge,
    window_partition,
)
from tests.architectures.frame import BOTH, Architecture, rewritten
from tests.architectures.layers import Mlp, OnChannelsFirst, ToMap, network

MAP, WINDOW, HEADS = (8, 12), 4, 3


class DenseSwin(nn.Module):
    """DRCT's residual dense group: Swin layers whose outputs are concatenated to their inputs, each adapted by a 1 x 1
    convolution and LeakyReLU; the last joins the input scaled by 0.2.
    """

    def __init__(self, dim: int, growth: int, size: Size) -> None:
        super().__init__()
        widths = [dim + k * growth for k in range(3)]
        self.layers = nn.ModuleList(
            SwinBlock(width, size, HEADS, WINDOW, shifted=k % 2 == 1, mlp_ratio=2.0) for k, width in enumerate(widths)
        )
        self.adapt = nn.ModuleList(nn.Conv2d(width, growth if k < 2 else dim, 1) for k, width in enumerate(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = x
        for k, (layer, adapt) in enumerate(zip(self.layers, self.adapt, strict=True)):
            made = OnChannelsFirst(adapt)(layer(joined))
            if k < 2:
                joined = torch.cat([joined, F.leaky_relu(made, 0.2)], dim=-1)
        return x + 0.2 * made


def drct() -> nn.Module:
    """Two dense groups and the long residual around them, back to an image of twice the size."""

    class Drct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 3, padding=1)
            self.groups = nn.Sequential(*(OnChannelsLast(DenseSwin(12, 6, MAP)) for _ in range(2)))
            self.tail = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.PixelShuffle(2))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.stem(image)
            return self.tail(self.groups(x) + x)

    return Drct()


class OnChannelsLast(nn.Module):
    """A layer of channels-last maps, used on a channels-first one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CoSwinBlock(nn.Module):
    """Shifted windows with a local branch: a depthwise and a 1 x 1 convolution over the map, fused by addition."""

    def __init__(self, dim: int, size: Size, shifted: bool) -> None:
        super().__init__()
        self.swin = SwinBlock(dim, size, HEADS, WINDOW, shifted, mlp_ratio=2.0)
        self.local = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.GELU(), nn.Conv2d(dim, dim, 1)
        )
        self.norm, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        x = x + self.swin.attend(normed) + OnChannelsFirst(self.local)(normed)
        return x + self.mlp(self.swin.norm2(x))


def coswin() -> nn.Module:
    return network(24, CoSwinBlock(24, MAP, shifted=False), CoSwinBlock(24, MAP, shifted=True))


class PatchExpanding(nn.Module):
    """Every token into 2 x 2 tokens of half the channels: `[B, H, W, C] -> [B, 2H, 2W, C/2]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Linear(dim, 2 * dim, bias=False), nn.LayerNorm(dim // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width, channels = x.shape[1:]
        x = self.expand(x).reshape(-1, height, width, 2, 2, channels // 2)
        return self.norm(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 2 * height, 2 * width, channels // 2))


class HbFormer(nn.Module):
    """A U-Net of Swin blocks: encoder, merge, bottleneck, expand, skip connection by concatenation, decoder."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = (MAP[0] // 2, MAP[1] // 2)
        self.stem = ToMap(dim)
        self.encoder, self.decoder = self.pair(dim, MAP), self.pair(dim, MAP)
        self.down, self.bottleneck, self.up = PatchMerging(dim), self.pair(2 * dim, half), PatchExpanding(2 * dim)
        self.join, self.head = nn.Linear(2 * dim, dim), nn.Conv2d(dim, 2, 1)

    @staticmethod
    def pair(dim: int, size: Size) -> nn.Sequential:
        return nn.Sequential(
            *(SwinBlock(dim, size, HEADS, WINDOW, shifted, mlp_ratio=2.0) for shifted in (False, True))
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skip = self.encoder(self.stem(image))
        x = self.up(self.bottleneck(self.down(skip)))
        x = self.decoder(self.join(torch.cat([x, skip], dim=-1)))
        return F.interpolate(self.head(x.permute(0, 3, 1, 2)), scale_factor=4.0, mode="nearest")


def hbformer() -> nn.Module:
    return HbFormer(24)


class StyleSwinBlock(nn.Module):
    """Double attention: the first half of the heads in plain windows, the second in shifted ones, then one projection.

    together: all heads in one softmax; otherwise two attentions side by side, as the authors write it.
    """

    mask: torch.Tensor

    def __init__(self, dim: int, size: Size, num_heads: int, together: bool) -> None:
        super().__init__()
        self.window, self.shift = (WINDOW, WINDOW), WINDOW // 2
        self.size, self.num_heads, self.head_dim, self.together = size, num_heads, dim // num_heads, together
        self.norm1, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(49, num_heads // 2)) for _ in range(2))
        self.register_buffer("mask", shift_mask(size, self.window, (self.shift, self.shift)), persistent=False)
        self.register_buffer("index", relative_position_index(self.window), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain, shifted = self.qkv(self.norm1(x)).reshape(*x.shape[:3], 3, 2, -1).unbind(-2)
        shifted = torch.roll(shifted, (-self.shift, -self.shift), dims=(1, 2))
        groups = [self.heads(plain), self.heads(shifted)]
        biases = [table[self.index].permute(2, 0, 1) for table in self.tables]
        if self.together:
            windows = self.mask.shape[0]
            bias = torch.cat([biases[0].expand(windows, -1, -1, -1), biases[1] + self.mask[:, None]], dim=1)
            attended = self.attend(torch.cat(groups, dim=2), bias).chunk(2, dim=2)
        else:
            attended = [self.attend(groups[0], biases[0]), self.attend(groups[1], biases[1] + self.mask[:, None])]
        first, second = (self.merge(a) for a in attended)
        x = x + self.proj(torch.cat([first, torch.roll(second, (self.shift, self.shift), dims=(1, 2))], dim=-1))
        return x + self.mlp(self.norm2(x))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, H, W, 3, nH/2*d] -> [3, B*nW, nH/2, N, d]`."""
        tokens = window_partition(x.flatten(3), self.window)
        return tokens.reshape(-1, WINDOW**2, 3, self.num_heads // 2, self.head_dim).permute(2, 0, 3, 1, 4)

    def attend(self, qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        query, key, value = qkv.unbind(0)
        logits = (query * self.head_dim**-0.5) @ key.transpose(-2, -1)
        if bias.dim() == 4:
            logits = (logits.reshape(-1, *bias.shape) + bias).reshape(logits.shape)
        else:
            logits = logits + bias
        return (torch.softmax(logits, -1) @ value).transpose(1, 2)

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        """`[B*nW, N, heads, d] -> [B, H, W, heads*d]`."""
        return window_merge(attended.flatten(2), self.window, self.size)


def style_swin() -> nn.Module:
    return network(24, StyleSwinBlock(24, MAP, 4, together=False))


def style_swin_together() -> nn.Module:
    return network(24, StyleSwinBlock(24, MAP, 4, together=True))


class ChannelAttention(nn.Sequential):
    """HAT's CAB: two convolutions, then every channel scaled by a sigmoid of the pooled map."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Conv2d(dim, dim // 3, 3, padding=1), nn.GELU(), nn.Conv2d(dim // 3, dim, 3, padding=1))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, 4, 1), nn.ReLU(), nn.Conv2d(4, dim, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x * torch.sigmoid(self.gate(x))


class HybridBlock(nn.Module):
    """HAT's HAB: shifted windows, and beside them channel attention weighted by a small constant."""

    def __init__(self, dim: int, size: Size, shifted: bool) -> None:
        super().__init__()
        self.swin = SwinBlock(dim, size, HEADS, WINDOW, shifted, mlp_ratio=2.0)
        self.channels = ChannelAttention(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.swin.norm1(x)
        x = x + self.swin.attend(normed) + 0.01 * OnChannelsFirst(self.channels)(normed)
        return x + self.swin.mlp(self.swin.norm2(x))


class OverlappingBlock(nn.Module):
    """HAT's OCAB: the queries of a window attend the keys of one half as wide again, cut out by unfold."""

    def __init__(self, dim: int, overlap: int = 2) -> None:
        super().__init__()
        self.head_dim, self.reach = dim // HEADS, WINDOW + overlap
        self.norm1, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.unfold = nn.Unfold(self.reach, stride=WINDOW, padding=overlap // 2)
        extent = WINDOW + self.reach - 1
        self.table = nn.Parameter(torch.zeros(extent**2, HEADS))
        self.register_buffer("index", self.offsets(extent), persistent=False)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def offsets(self, extent: int) -> torch.Tensor:
        """int64 `[N, M]`: the bias table's row of every query and key token."""
        inside, around = (torch.cartesian_prod(*[torch.arange(n)] * 2) for n in (WINDOW, self.reach))
        offset = around[None] - inside[:, None] + WINDOW - 1
        return offset[..., 0] * extent + offset[..., 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width, dim = x.shape[1:]
        query, key_value = self.qkv(self.norm1(x)).split([dim, 2 * dim], dim=-1)
        query = window_partition(query, (WINDOW, WINDOW)).reshape(-1, WINDOW**2, HEADS, self.head_dim)
        columns = self.unfold(key_value.permute(0, 3, 1, 2)).transpose(1, 2)  # [B, nW, 2*C*M]
        key, value = columns.reshape(-1, 2, HEADS, self.head_dim, self.reach**2).transpose(-2, -1).unbind(1)
        logits = (query.transpose(1, 2) * self.head_dim**-0.5) @ key.transpose(-2, -1)
        logits = logits + self.table[self.index].permute(2, 0, 1)
        attended = (torch.softmax(logits, -1) @ value).transpose(1, 2).flatten(2)
        x = x + self.proj(window_merge(attended, (WINDOW, WINDOW), (height, width)))
        return x + self.mlp(self.norm2(x))


def hat() -> nn.Module:
    return network(24, HybridBlock(24, MAP, False), HybridBlock(24, MAP, True), OverlappingBlock(24))


def pair(size: Size, count: int = 1) -> tuple[object, ...]:
    return (
        rewritten("window", count, feature_size=size, window_size=(4, 4), shift_size=(0, 0), bias="constant"),
        rewritten("window", count, feature_size=size, window_size=(4, 4), shift_size=(2, 2), mask="shift"),
    )


HALF = (MAP[0] // 2, MAP[1] // 2)
ARCHITECTURES = (
    Architecture("DRCT", drct, (1, 3, *MAP), (rewritten("window", 4, shift_size=(0, 0)), pair(MAP, 2)[1])),
    Architecture("StyleSwin", style_swin, (1, 3, 32, 48), pair(MAP)),
    Architecture(
        "StyleSwin",
        style_swin_together,
        (1, 3, 32, 48),
        (rewritten("window", feature_size=MAP, window_size=(4, 4), num_heads=4),),
        variant="in one softmax",
    ),
    Architecture(
        "HAT",
        hat,
        (1, 3, 32, 48),
        (*pair(MAP), rewritten("halo", feature_size=MAP, window_size=(4, 4), bias="constant")),
        exporters=BOTH,
    ),
    Architecture("CoSwin", coswin, (1, 3, 32, 48), pair(MAP)),
    Architecture(
        "HBFormer",
        hbformer,
        (1, 3, 32, 48),
        (*pair(MAP, 2), rewritten("window", 2, feature_size=HALF, window_size=(4, 4))),
        clean=False,  # patch expanding rearranges like a merge of windows
    ),
)
