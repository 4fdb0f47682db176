"""Architectures taken from timm and torchvision, with small arguments."""

from __future__ import annotations

from typing import Any

import pytest

from examples.exporting import import_torchvision
from tests.architectures.frame import BOTH, Architecture, left, rewritten

GLOBAL = "every token attends|global attention"


def timm_module(name: str) -> Any:
    import_torchvision()
    return pytest.importorskip(f"timm.models.{name}")


def swin_timm() -> Any:
    options = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "num_classes": 5}
    return timm_module("swin_transformer").SwinTransformer(img_size=(60, 88), **options)


def swin_torchvision() -> Any:
    import_torchvision()
    module = pytest.importorskip("torchvision.models.swin_transformer")
    return module.SwinTransformer([4, 4], 24, [2, 2], [3, 6], [4, 4], stochastic_depth_prob=0.0, num_classes=5)


def davit() -> Any:
    return timm_module("davit").DaVit(
        depths=(1, 1), embed_dims=(24, 48), num_heads=(3, 6), window_size=4, mlp_ratio=2, num_classes=5
    )


def crossvit() -> Any:
    return timm_module("crossvit").CrossVit(
        img_size=48,
        img_scale=(1.0, 1.0),
        patch_size=(8, 12),
        embed_dim=(24, 32),
        depth=((1, 1, 0),),
        num_heads=(2, 2),
        mlp_ratio=(2, 2, 1),
        num_classes=5,
    )


def gcvit() -> Any:
    return timm_module("gcvit").GlobalContextVit(
        img_size=(64, 96),
        window_size=((4, 6), (4, 6)),
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        mlp_ratio=2,
        num_classes=5,
    )


def shvit() -> Any:
    return timm_module("shvit").SHViT(
        embed_dim=(16, 32, 48), partial_dim=(8, 8, 16), qk_dim=(4, 4, 8), depth=(1, 1, 1), num_classes=5
    )


def tnt() -> Any:
    return timm_module("tnt").TNT(
        img_size=(48, 80), embed_dim=36, inner_dim=12, depth=2, num_heads_inner=3, num_heads_outer=4, num_classes=5
    )


def maxvit_timm() -> Any:
    module = timm_module("maxxvit")
    attention = module.MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4))
    config = module.MaxxVitCfg(
        embed_dim=(16, 32), depths=(1, 1), block_type=("M", "M"), stem_width=8, transformer_cfg=attention
    )
    return module.MaxxVit(config, img_size=(64, 96), num_classes=5)


def maxvit_torchvision() -> Any:
    import_torchvision()
    module = pytest.importorskip("torchvision.models.maxvit")
    return module.MaxVit((64, 64), 8, 4, [16, 24], [1, 1], 8, 0.0, num_classes=5)


def swin_windows(row: str, build: Any, variant: str, exporters: tuple[str, ...]) -> Architecture:
    """Two stages of plain and shifted windows of 4 x 4, on maps of 15 x 22 and 8 x 11 pixels."""
    sites = [
        rewritten("window", feature_size=size, window_size=(4, 4), shift_size=(shift, shift), mask=mask)
        for size in ((15, 22), (8, 11))
        for shift, mask in ((0, "none"), (2, "shift"))
    ]
    return Architecture(row, build, (1, 3, 60, 88), tuple(sites), variant=variant, exporters=exporters)


ARCHITECTURES = (
    swin_windows("Flash Window Attention / Swin", swin_timm, "timm", BOTH),
    swin_windows("Flash Window Attention / Swin", swin_torchvision, "torchvision", ("torchscript",)),
    Architecture(
        "DaViT",
        davit,
        (1, 3, 56, 40),
        (
            rewritten("window", feature_size=(14, 10), window_size=(4, 4)),
            rewritten("window", feature_size=(7, 5), window_size=(4, 4)),
            left("channel", 2, reason="the softmax runs over channels"),
        ),
        folds=8,  # the conditional position encodings
        clean=False,
    ),
    Architecture("CrossViT", crossvit, (1, 3, 48, 48), (left("global", 4, reason=GLOBAL),)),
    Architecture(
        "GC ViT",
        gcvit,
        (1, 3, 64, 96),
        (
            rewritten("window", 2, feature_size=(16, 24), window_size=(4, 6)),
            rewritten("window", 2, feature_size=(8, 12), window_size=(4, 6)),
        ),
    ),
    Architecture("SHViT", shvit, (1, 3, 192, 256), (left("global", 3, reason=GLOBAL),), folds=7),
    Architecture(
        "Transformer in Transformer",
        tnt,
        (1, 3, 48, 80),
        (rewritten("window", 2, feature_size=(15 * 16,), window_size=(16,)), left("global", 2, reason=GLOBAL)),
        exporters=BOTH,
        in_rows=True,
    ),
    Architecture(
        "MaxViT",
        maxvit_timm,
        (1, 3, 64, 96),
        (
            rewritten("window", feature_size=(16, 24), window_size=(4, 4)),
            rewritten("grid", feature_size=(16, 24), window_size=(4, 4), dilation=(4, 6)),
            rewritten("window", feature_size=(8, 12), window_size=(4, 4)),
            rewritten("grid", feature_size=(8, 12), window_size=(4, 4), dilation=(2, 3)),
        ),
        variant="timm",
        exporters=BOTH,
    ),
    Architecture(
        "MaxViT",
        maxvit_torchvision,
        (1, 3, 64, 64),
        (
            rewritten("window", feature_size=(16, 16), window_size=(4, 4)),
            rewritten("grid", feature_size=(16, 16), window_size=(4, 4), dilation=(4, 4)),
            rewritten("window", feature_size=(8, 8), window_size=(4, 4)),
            rewritten("grid", feature_size=(8, 8), window_size=(4, 4), dilation=(2, 2)),
        ),
        variant="torchvision",
    ),
)
