"""What people deploy, as timm and torchvision ship it: the real modules with few blocks and few channels.

The sides of the images differ, and need padding where the model allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from examples.exporting import import_torchvision
from tests.architectures.frame import BOTH, DYNAMO, TORCHSCRIPT, Architecture, Expect, left, rewritten
from tests.zoo import timm_models
from tests.zoo.model import imported

ZOO = {m.name: m for m in timm_models.MODELS}


def installed(package: str) -> None:
    """Skip the test where a package is missing."""
    import_torchvision()
    pytest.importorskip(package)


def timm(name: str, **options: Any) -> Any:
    """timm.create_model; skips the test where timm is missing."""
    installed("timm")
    return timm_models.create(name, **options)


def timm_class(module: str, name: str) -> Any:
    """A class of timm.models, for options that its named models do not take; skips the test where timm is missing."""
    installed("timm")
    return getattr(imported(f"timm.models.{module}"), name)


def zoo(name: str) -> Callable[[], Any]:
    """A small timm model that the zoo has too; skips the test where timm is missing."""

    def build() -> Any:
        installed("timm")
        return ZOO[f"timm_{name}"].build()

    return build


def torchvision(name: str) -> Any:
    """A module of torchvision.models; skips the test where torchvision is missing."""
    installed("torchvision")
    return imported(f"torchvision.models.{name}")


def timm_maxvit() -> Any:
    return timm(
        "maxvit_tiny_rw_224",
        img_size=(64, 96),
        stem_width=8,
        embed_dim=(16, 32),  # no channel count that the pooled gates could have in common with the 24 windows
        depths=(1, 1),
        block_type=("M", "M"),
        transformer_dim_head=8,
        transformer_window_size=(4, 4),
        transformer_grid_size=(4, 4),
    )


def timm_efficientvit() -> Any:
    return timm(
        "efficientvit_m0",
        img_size=128,
        embed_dim=(16, 32),
        key_dim=(4, 4),
        depth=(1, 1),
        num_heads=(2, 2),
        window_size=(3, 4),  # the second map is one window
        kernels=(3, 3),
    )


def timm_vit() -> Any:
    return timm("vit_tiny_patch16_224", img_size=(48, 64), embed_dim=24, depth=2, num_heads=3)


def swin(*, version: int = 1) -> Any:
    module = torchvision("swin_transformer")
    options = (
        {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2} if version == 2 else {}
    )
    return module.SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=[4, 4], num_classes=5,
        stochastic_depth_prob=0.0, **options,
    )  # fmt: skip


def swin_v2() -> Any:
    return swin(version=2)


def swin3d() -> Any:
    module = torchvision("video.swin_transformer")
    return module.SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=24, depths=[2], num_heads=[3], window_size=[2, 4, 4], num_classes=5,
        stochastic_depth_prob=0.0,
    )  # fmt: skip


def maxvit() -> Any:
    return torchvision("maxvit").MaxVit(
        input_size=(64, 64), stem_channels=8, partition_size=4, block_channels=[16, 24], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.0, num_classes=5,
    )  # fmt: skip


def windows(
    sizes: tuple[tuple[int, ...], ...], window: tuple[int, ...], shift: tuple[int, ...], **fields: Any
) -> tuple[Expect, ...]:
    """A pair of blocks per stage: windows, then shifted windows, each with a relative position bias."""
    return tuple(
        rewritten("window", feature_size=size, window_size=window, shift_size=shifted, bias="constant", **fields)
        for size in sizes
        for shifted in ((0,) * len(window), shift)
    )


def blocks_and_grids(*sizes: tuple[int, int]) -> tuple[Expect, ...]:
    """MaxViT: windows of 4 x 4, then a grid of 4 x 4, per map."""
    return tuple(
        rewritten(kind, feature_size=size, window_size=(4, 4), dilation=dilation, bias="constant")
        for size in sizes
        for kind, dilation in (("window", (1, 1)), ("grid", (size[0] // 4, size[1] // 4)))
    )


PADDED = ((15, 22), (8, 11))
EVEN = ((16, 24), (8, 12))
# what the dynamo exporter says of scaled_dot_product_attention over other ranks
ONLY_4D = "only 4D query, key, and value are supported"
ARCHITECTURES = (
    Architecture(
        "deployed: timm swin", zoo("swin_padded"), (1, 3, 60, 88), windows(PADDED, (4, 4), (2, 2)), exporters=BOTH
    ),
    Architecture("deployed: timm swinv2", zoo("swinv2"), (1, 3, 64, 96), windows(EVEN, (4, 4), (2, 2))),
    Architecture("deployed: timm maxvit", timm_maxvit, (1, 3, 64, 96), blocks_and_grids(*EVEN), exporters=BOTH),
    Architecture(
        "deployed: timm gcvit",
        zoo("gcvit"),
        (1, 3, 64, 96),
        tuple(
            rewritten("window", 2, num_heads=heads, feature_size=size, window_size=(4, 6), bias="constant")
            for heads, size in zip((2, 4), EVEN, strict=True)
        ),
    ),
    Architecture(
        "deployed: timm davit",
        zoo("davit"),
        (1, 3, 60, 88),
        (
            rewritten("window", feature_size=(15, 22), window_size=(4, 4), num_heads=2),
            rewritten("window", feature_size=(8, 11), window_size=(4, 4), num_heads=4),
            left("channel", 2, reason="channel attention"),
        ),
        folds=8,  # the conditional position encodings
    ),
    Architecture(
        "deployed: timm twins_svt",
        zoo("twins_svt"),
        (1, 3, 64, 96),
        (
            rewritten("window", feature_size=(16, 24), window_size=(4, 4), num_heads=2),
            left("global", reason="each of the 384 queries attends the same 24 keys"),
            rewritten("window", feature_size=(8, 12), window_size=(4, 4), num_heads=4),
            left("global", reason="each of the 96 queries attends the same 24 keys"),
        ),
        folds=2,  # the conditional position encodings
        fails={DYNAMO: ONLY_4D},
    ),
    Architecture(
        "VOLO",
        zoo("volo"),
        (1, 3, 64, 96),
        (
            rewritten("outlook", num_heads=2, feature_size=(8, 12), kernel_size=(3, 3)),
            left("global", reason="each of the 24 queries attends the same 24 keys"),
            left("global", 2, reason="the one query attends all 25 keys"),
        ),
        exporters=(DYNAMO,),
        fails={TORCHSCRIPT: "col2im"},
    ),
    Architecture(
        "Transformer in Transformer",
        zoo("tnt"),
        (1, 3, 48, 64),
        (
            rewritten("window", 2, num_heads=2, head_dim=4, feature_size=(12 * 16,), window_size=(16,)),
            left("global", 2, reason="each of the 13 queries attends the same 13 keys"),
        ),
        variant="timm",
        in_rows=True,
    ),
    Architecture(
        "EfficientViT (MSRA)",
        timm_efficientvit,
        (1, 3, 128, 128),
        (
            rewritten("window", 2, feature_size=(9 * 9,), window_size=(9,), head_dim=4, bias="constant"),
            left("global", 2, reason="each of the 16 queries attends the same 16 keys"),
        ),
        folds=6,  # depthwise convolutions added to their input
        exporters=BOTH,
        clean=False,
        in_rows=True,  # the queries are convolved inside each window
    ),
    Architecture(
        "deployed: timm samvit",
        zoo("samvit"),
        (1, 3, 80, 112),
        (
            rewritten("window", num_heads=3, feature_size=(5, 7), window_size=(3, 3), bias="tensor"),
            left("global", reason="each of the 35 queries attends the same 35 keys"),
        ),
        fails={DYNAMO: ONLY_4D},
    ),
    Architecture(
        "deployed: timm mobilevit",
        zoo("mobilevit"),
        (1, 3, 64, 96),
        tuple(
            rewritten("grid", count, feature_size=size, window_size=window, dilation=dilation)
            for count, size, window, dilation in (
                (2, (8, 12), (4, 6), (2, 2)),
                (4, (4, 6), (2, 3), (2, 2)),
                (3, (2, 4), (1, 2), (1, 2)),
            )
        ),
    ),
    Architecture(
        "Visual analytics of ViT, OAT",
        timm_vit,
        (1, 3, 48, 64),
        (left("global", 2, num_heads=3, reason="each of the 13 queries attends the same 13 keys"),),
    ),
    Architecture(
        "ConViT",
        zoo("convit"),
        (1, 3, 48, 48),
        (
            left("global", 2, reason="each of the 9 queries attends the same 9 keys"),
            left("other", 2, reason="the logits are the same for every input"),
            left("global", reason="each of the 10 queries attends the same 10 keys"),
        ),
    ),
    Architecture(
        "Brain-Score dual-stream",
        zoo("crossvit"),
        (1, 3, 48, 48),
        (
            left("global", 3, reason="each of the 17 queries attends the same 17 keys"),
            left("global", 2, reason="the one query attends all 17 keys"),
        ),
    ),
    Architecture("deployed: torchvision swin_t", swin, (1, 3, 60, 88), windows(PADDED, (4, 4), (2, 2))),
    Architecture(
        "deployed: torchvision swin_v2_t", swin_v2, (1, 3, 60, 88), windows(PADDED, (4, 4), (2, 2)), clean=False
    ),
    Architecture(
        "deployed: torchvision swin3d_t", swin3d, (1, 3, 4, 36, 56), windows(((2, 9, 14),), (2, 4, 4), (0, 2, 2))
    ),
    Architecture("deployed: torchvision maxvit_t", maxvit, (1, 3, 64, 64), blocks_and_grids((16, 16), (8, 8))),
)
