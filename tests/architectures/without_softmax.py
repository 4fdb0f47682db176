"""Mixing of pixels without a softmax over keys: there is no site, though there may be branches to fold."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.architectures.frame import BOTH, Architecture
from tests.architectures.layers import OnChannelsFirst, block, network

DIM, HEADS = 24, 3


class LargeKernelAttention(nn.Module):
    """BEVANet's: depthwise kernels of several sizes and shapes, in training beside one another, gate the map.

    `[B, C, H, W] -> [B, C, H, W]`; each branch has its own batch norm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj = nn.Conv2d(DIM, DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.branches = nn.ModuleList(self.branch(*size) for size in ((7, 7), (3, 3), (1, 7), (7, 1)))
        self.dilated = self.branch(3, 3, dilation=3)

    @staticmethod
    def branch(rows: int, columns: int, dilation: int = 1) -> nn.Sequential:
        padding = (dilation * (rows // 2), dilation * (columns // 2))
        conv = nn.Conv2d(DIM, DIM, (rows, columns), padding=padding, dilation=dilation, groups=DIM, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.embed(x))
        gate = self.dilated(x)
        for branch in self.branches:
            gate = gate + branch(x)
        return self.proj(gate * x)


def bevanet() -> nn.Module:
    return network(DIM, block(DIM, OnChannelsFirst(LargeKernelAttention())))


class HyenaOperator(nn.Module):
    """Multi-dimensional Hyena of order two: gates, and a convolution as long as the map whose filter an MLP makes of
    the offset, fading with distance. `[B, C, H, W] -> [B, C, H, W]`.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.embed, self.proj = nn.Conv2d(DIM, 3 * DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.short = nn.Conv2d(3 * DIM, 3 * DIM, 3, padding=1, groups=3 * DIM)
        self.filter = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, DIM))
        reach = (torch.linspace(-1, 1, 2 * rows - 1), torch.linspace(-1, 1, 2 * columns - 1))
        self.register_buffer("offsets", torch.cartesian_prod(*reach), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, other, value = self.short(self.embed(x)).chunk(3, dim=1)
        fading = torch.exp(-self.offsets.square().sum(1, keepdim=True))
        kernel = (self.filter(self.offsets) * fading).t().reshape(DIM, 1, 2 * self.rows - 1, 2 * self.columns - 1)
        mixed = F.conv2d(other * value, kernel, padding=(self.rows - 1, self.columns - 1), groups=DIM)
        return self.proj(gate * mixed)


def hyena() -> nn.Module:
    return network(DIM, block(DIM, OnChannelsFirst(HyenaOperator(6, 8))))


class InLineAttention(nn.Module):
    """Injective linear attention: weights normed by subtraction, so that each row sums to one, and a 3 x 3 residual of
    the values with weights predicted from the mean token. `[B, H, W, C] -> [B, H, W, C]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.residual = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, 9 * HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        tokens = x.flatten(1, 2)
        query, key, value = self.qkv(tokens).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = (torch.nn.functional.leaky_relu(t, 0.1) for t in (query, key))
        share = 1.0 / (height * width)
        attended = query @ (key.transpose(-2, -1) @ value * share)
        attended = attended - (query @ key.mean(2, keepdim=True).transpose(-2, -1) - 1) * value.mean(2, keepdim=True)
        weights = self.residual(tokens.mean(1)).reshape(-1, HEADS, 9, 1, 1, 1)
        maps = F.pad(value.transpose(-2, -1).unflatten(3, (height, width)), (1, 1, 1, 1))
        for slot in range(9):
            row, column = divmod(slot, 3)
            near = maps[..., row : row + height, column : column + width]
            attended = attended + (weights[:, :, slot] * near).flatten(3).transpose(-2, -1)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))


def inline() -> nn.Module:
    return network(DIM, block(DIM, InLineAttention()))


class RecursiveGate(nn.Module):
    """HorNet's recursive gated convolution of order three: `[B, C, H, W] -> [B, C, H, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = (DIM // 4, DIM // 2, DIM)
        self.embed, self.proj = nn.Conv2d(DIM, 2 * DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.depthwise = nn.Conv2d(sum(self.widths), sum(self.widths), 7, padding=3, groups=sum(self.widths))
        self.widen = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.widths[:-1], self.widths[1:], strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, rest = self.embed(x).split([self.widths[0], sum(self.widths)], dim=1)
        gates = self.depthwise(rest).split(list(self.widths), dim=1)
        x = gate * gates[0]
        for widen, other in zip(self.widen, gates[1:], strict=True):
            x = widen(x) * other
        return self.proj(x)


class SelectiveScan(nn.Module):
    """VCMamba's mixing along the rows: a gated recurrence whose decay and input are made from the pixel, unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, decay, gate = self.embed(x).chunk(3, dim=-1)
        decay = torch.sigmoid(decay)
        state, states = torch.zeros_like(value[:, :, 0]), []
        for column in range(x.shape[2]):
            state = decay[:, :, column] * state + (1 - decay[:, :, column]) * value[:, :, column]
            states.append(state)
        return self.proj(torch.stack(states, dim=2) * F.silu(gate))


def hornet() -> nn.Module:
    return network(DIM, block(DIM, OnChannelsFirst(RecursiveGate())))


def vcmamba() -> nn.Module:
    return network(DIM, block(DIM, SelectiveScan()))


ARCHITECTURES = (
    Architecture("BEVANet", bevanet, (1, 3, 36, 40), folds=1, exporters=BOTH),
    Architecture("Multi-dimensional Hyena", hyena, (1, 3, 24, 32)),
    Architecture("InLine attention", inline, (1, 3, 24, 32)),
    Architecture("VCMamba, HorNet", vcmamba, (1, 3, 24, 32), variant="VCMamba"),
    Architecture("VCMamba, HorNet", hornet, (1, 3, 24, 32), variant="HorNet"),
)
