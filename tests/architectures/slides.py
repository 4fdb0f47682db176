"""Neighbourhoods gathered by convolution or unfold: Slide-Transformer and its baseline."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from examples.models.slide_transformer import SlideBlock
from examples.models.unfold_attention import UnfoldNet
from tests.architectures.frame import BOTH, DYNAMO, TORCHSCRIPT, Architecture, rewritten
from tests.architectures.layers import network


def slide_transformer() -> nn.Module:
    """Slide Attention with the deformed shifting module, on a 6 x 10 map: kernels of 3 and 5."""
    return network(24, SlideBlock(24, 3, 3), SlideBlock(24, 3, 5))


def sasa() -> nn.Module:
    """Unfold attention on a 9 x 7 map: kernels of 3, 5 and a dilated 3."""
    return UnfoldNet(18, 3, (3, 5, 3), (1, 1, 2), num_classes=5)


class StandAlone(nn.Module):
    """Stand-alone self-attention over 5 x 5: the map is padded before keys and values are computed, and embeddings of
    rows are added to one half of the keys' channels, of columns to the other (arXiv 1906.05909).
    """

    def __init__(self, dim: int = 24, num_heads: int = 3, kernel: int = 5) -> None:
        super().__init__()
        self.num_heads, self.kernel = num_heads, kernel
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.query, self.key, self.value = (nn.Conv2d(dim, dim, 1, bias=False) for _ in range(3))
        self.rows = nn.Parameter(torch.randn(dim // 2, 1, 1, kernel, 1))
        self.columns = nn.Parameter(torch.randn(dim // 2, 1, 1, 1, kernel))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        batch, dim, height, width = x.shape
        heads = (batch, self.num_heads, dim // self.num_heads, height, width)
        key, value = (self.neighbours(project(F.pad(x, [self.kernel // 2] * 4))) for project in (self.key, self.value))
        halves = key.chunk(2, dim=1)
        key = torch.cat((halves[0] + self.rows, halves[1] + self.columns), dim=1)
        logits = (self.query(x).view(*heads, 1) * key.reshape(*heads, -1)).sum(2, keepdim=True)
        weights = logits.softmax(dim=-1)
        return torch.einsum("bndhwk,bndhwk->bndhw", weights.expand(*heads, -1), value.reshape(*heads, -1)).flatten(1, 2)

    def neighbours(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H + k - 1, W + k - 1] -> [B, C, H, W, k, k]`."""
        return x.unfold(2, self.kernel, 1).unfold(3, self.kernel, 1)


ARCHITECTURES = (
    Architecture(
        "Slide-Transformer",
        slide_transformer,
        (1, 3, 24, 40),
        (
            rewritten("neighborhood", kernel_size=(3, 3), border="zero", feature_size=(6, 10), bias="constant"),
            rewritten("neighborhood", kernel_size=(5, 5), border="zero", feature_size=(6, 10), bias="constant"),
        ),
        folds=4,
        exporters=BOTH,
    ),
    Architecture(
        "(its baseline) SASA / Im2Col attention",
        sasa,
        (1, 3, 36, 28),
        (
            rewritten("neighborhood", kernel_size=(3, 3), dilation=(1, 1), border="zero"),
            rewritten("neighborhood", kernel_size=(5, 5), dilation=(1, 1), border="zero"),
            rewritten("neighborhood", kernel_size=(3, 3), dilation=(2, 2), border="zero"),
        ),
        exporters=BOTH,
    ),
    Architecture(
        "(its baseline) SASA / Im2Col attention",
        StandAlone,
        (1, 3, 36, 28),
        (rewritten("neighborhood", kernel_size=(5, 5), feature_size=(9, 7), num_heads=3),),
        variant="embeddings of rows and columns",
        exporters=(DYNAMO,),
        fails={TORCHSCRIPT: "Unfold"},
    ),
)
