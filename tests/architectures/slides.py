"""Neighbourhoods gathered by convolution or unfold: Slide-Transformer and its baseline."""

from __future__ import annotations

from torch import nn

from examples.models.slide_transformer import SlideBlock
from examples.models.unfold_attention import UnfoldNet
from tests.architectures.frame import BOTH, Architecture, rewritten
from tests.architectures.layers import network


def slide_transformer() -> nn.Module:
    """Slide Attention with the deformed shifting module, on a 6 x 10 map: kernels of 3 and 5."""
    return network(24, SlideBlock(24, 3, 3), SlideBlock(24, 3, 5))


def sasa() -> nn.Module:
    """Unfold attention on a 9 x 7 map: kernels of 3, 5 and a dilated 3."""
    return UnfoldNet(18, 3, (3, 5, 3), (1, 1, 2), num_classes=5)


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
)
