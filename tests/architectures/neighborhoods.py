"""A neighbourhood for every pixel, in forms that are no plain unfold.

Letters: B batch, H/W height and width, C channels, P pixels, K keys per query, nH heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.architectures.frame import BOTH, Architecture, left, rewritten
from tests.architectures.layers import Attention, Mlp, OnChannelsFirst, Residual, block, network

DIM, HEADS = 24, 3


def inward(extent: int, kernel: int, dilation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For every position of an axis the `kernel` positions it attends, and their distance in steps, int64 [extent, K].

    They keep its phase modulo the dilation, and the neighbourhood moves inside at the border.
    """
    position = torch.arange(extent)
    phase = position % dilation
    steps = (extent - phase + dilation - 1) // dilation
    first = (position // dilation - kernel // 2).clamp(min=0)
    first = torch.minimum(first, steps - kernel)
    slots = first[:, None] + torch.arange(kernel)
    return slots * dilation + phase[:, None], slots - (position // dilation)[:, None]


class NeighborhoodAttention(nn.Module):
    """NAT and DiNAT: `[B, H, W, C] -> [B, H, W, C]`, keys gathered by a constant index, bias by relative position."""

    def __init__(self, size: tuple[int, int], kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.head_dim = DIM // HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.table = nn.Parameter(torch.zeros(HEADS, 2 * kernel - 1, 2 * kernel - 1))
        (rows, row_steps), (columns, column_steps) = (inward(extent, kernel, dilation) for extent in size)
        index = rows[:, None, :, None] * size[1] + columns[None, :, None, :]
        bias = (
            (row_steps[:, None, :, None] + kernel - 1) * (2 * kernel - 1) + column_steps[None, :, None, :] + kernel - 1
        )
        self.register_buffer("index", index.reshape(-1, kernel**2), persistent=False)
        self.register_buffer("bias_index", bias.reshape(-1, kernel**2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).flatten(1, 2).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        key, value = key[:, :, self.index], value[:, :, self.index]  # [B, nH, P, K, d]
        logits = (query.unsqueeze(3) * self.head_dim**-0.5) @ key.transpose(-2, -1)
        logits = logits + self.table.flatten(1)[:, self.bias_index].unsqueeze(2)
        attended = (torch.softmax(logits, dim=-1) @ value).squeeze(3)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))


def nat() -> nn.Module:
    return network(DIM, block(DIM, NeighborhoodAttention((7, 9), 3)), block(DIM, NeighborhoodAttention((7, 9), 5)))


def dinat() -> nn.Module:
    return network(DIM, block(DIM, NeighborhoodAttention((7, 9), 3)), block(DIM, NeighborhoodAttention((7, 9), 3, 2)))


class SlidingVideoAttention(Attention):
    """FreeSwim: dense attention of all tokens of a clip under a constant mask that leaves to each token the window
    around it, which moves inside at the borders.
    """

    mask: torch.Tensor

    def __init__(self, size: tuple[int, int, int], window: tuple[int, int, int]) -> None:
        super().__init__(DIM, HEADS)
        allowed = torch.ones(1, 1, dtype=torch.bool)
        for extent, own in zip(size, window, strict=True):
            near = torch.zeros(extent, extent, dtype=torch.bool).scatter(1, inward(extent, own, 1)[0], True)
            allowed = torch.kron(allowed.int(), near.int()).bool()
        self.register_buffer("mask", ~allowed, persistent=False)

    def logits(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query @ key.transpose(-2, -1)).masked_fill(self.mask, float("-inf"))


class FreeSwim(nn.Module):
    """A clip `[B, 3, T, H, W]` in patches of 1 x 4 x 4, and one block on its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, DIM, (1, 4, 4), (1, 4, 4))
        self.block = block(DIM, SlidingVideoAttention((3, 5, 6), (3, 3, 3)))
        self.head = nn.Linear(DIM, 5)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(clip).flatten(2).transpose(1, 2)).mean(1))


class DynamicLocalAttention(nn.Module):
    """DLGSANet's MHDLSA: convolutions predict a k x k kernel for every pixel and head, which is applied to the values
    around the pixel. `[B, C, H, W] -> [B, C, H, W]`.
    """

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.kernel = kernel
        self.value, self.proj = nn.Conv2d(DIM, DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.predict = nn.Sequential(
            nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), nn.ReLU(), nn.Conv2d(DIM, HEADS * kernel**2, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        slots = self.kernel**2
        weights = self.predict(x).reshape(-1, HEADS, 1, slots, height, width)
        around = F.unfold(self.value(x), self.kernel, padding=self.kernel // 2)
        around = around.reshape(-1, HEADS, DIM // HEADS, slots, height, width)
        return self.proj((weights * around).sum(3).reshape(-1, DIM, height, width))


class StrongestAttention(Attention):
    """Sparse global attention: each query keeps its strongest logits."""

    def logits(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        logits = query @ key.transpose(-2, -1)
        strongest = logits.topk(8, dim=-1)
        return torch.full_like(logits, float("-inf")).scatter(-1, strongest.indices, strongest.values)


class DlgsaNet(nn.Module):
    """Restoration: local blocks, a sparse global one, and the long residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, DIM, 3, padding=1), nn.Conv2d(DIM, 3, 3, padding=1)
        self.local = nn.Sequential(*(Residual(DIM, OnChannelsFirst(DynamicLocalAttention(k))) for k in (3, 5)))
        self.sparse = nn.Sequential(Residual(DIM, StrongestAttention(DIM, HEADS)), Residual(DIM, Mlp(DIM)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.local(self.stem(image).permute(0, 2, 3, 1))
        x = self.sparse(x.flatten(1, 2)).reshape(x.shape)
        return image + self.tail(x.permute(0, 3, 1, 2))


ARCHITECTURES = (
    Architecture(
        "DiNAT / NAT",
        nat,
        (1, 3, 28, 36),
        (
            rewritten("neighborhood", feature_size=(7, 9), kernel_size=(3, 3), border="inward", bias="constant"),
            rewritten("neighborhood", feature_size=(7, 9), kernel_size=(5, 5), border="inward", bias="constant"),
        ),
        variant="NAT",
        exporters=BOTH,
    ),
    Architecture(
        "DiNAT / NAT",
        dinat,
        (1, 3, 28, 36),
        (
            rewritten("neighborhood", kernel_size=(3, 3), dilation=(1, 1), border="inward"),
            rewritten("neighborhood", kernel_size=(3, 3), dilation=(2, 2), border="inward"),
        ),
        variant="DiNAT",
    ),
    Architecture(
        "FreeSwim",
        FreeSwim,
        (1, 3, 3, 20, 24),
        (rewritten("neighborhood", feature_size=(3, 5, 6), kernel_size=(3, 3, 3), border="inward"),),
        exporters=BOTH,
    ),
    Architecture(
        "DLGSANet",
        DlgsaNet,
        (1, 3, 8, 10),
        (
            rewritten("outlook", feature_size=(8, 10), kernel_size=(3, 3)),
            rewritten("outlook", feature_size=(8, 10), kernel_size=(5, 5)),
            left(
                "other", reason="the logits are chosen from data: they come from ScatterElements, at indices that TopK"
            ),
        ),
    ),
)
