"""torchvision's windowed models: small ones, and the named defaults at full size."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.zoo.model import TORCHSCRIPT, Kind, Model, Shape, imported

SHIFTED = "shifted windows"
GLOBAL = r"each of the \d+ queries attends the same \d+ keys"


def swin(*, version: int = 1) -> Any:
    module = imported("torchvision.models.swin_transformer")
    v2 = {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2} if version == 2 else {}
    return module.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[3, 6],
        window_size=[4, 4],
        num_classes=5,
        stochastic_depth_prob=0.0,
        **v2,
    )


def swin3d() -> Any:
    return imported("torchvision.models.video.swin_transformer").SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[3, 6],
        window_size=[2, 4, 4],
        num_classes=5,
        stochastic_depth_prob=0.0,
    )


def maxvit() -> Any:
    return imported("torchvision.models.maxvit").MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=4,
        block_channels=[16, 24],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )


def named(name: str) -> Any:
    module = imported("torchvision.models.video") if name == "swin3d_t" else imported("torchvision.models")
    return getattr(module, name)(weights=None)


def full(name: str, attention: str, shape: Shape, rewritten: dict[Kind, int], left: dict[str, int]) -> Model:
    return Model(
        f"torchvision_{name}",
        "torchvision",
        attention,
        partial(named, name),
        (shape,),
        rewritten,
        left,
        exporters=(TORCHSCRIPT,),
        full=True,
    )


MODELS = (
    Model("tv_swin", "torchvision", SHIFTED, swin, ((1, 3, 64, 96),), {"window": 4}),
    Model("tv_swin_padded", "torchvision", f"{SHIFTED}, padded map", swin, ((1, 3, 60, 88),), {"window": 4}),
    Model(
        "tv_swin_v2",
        "torchvision",
        f"{SHIFTED}, cosine, MLP bias",
        partial(swin, version=2),
        ((1, 3, 60, 88),),
        {"window": 4},
    ),
    Model("tv_swin3d", "torchvision", f"{SHIFTED} in 3-D", swin3d, ((1, 3, 8, 60, 88),), {"window": 4}),
    Model("tv_maxvit", "torchvision", "windows, grid", maxvit, ((1, 3, 64, 64),), {"window": 2, "grid": 2}),
    full("swin_t", SHIFTED, (1, 3, 224, 224), {"window": 10}, {GLOBAL: 2}),
    full("swin_v2_t", f"{SHIFTED}, cosine, MLP bias", (1, 3, 256, 256), {"window": 10}, {GLOBAL: 2}),
    full("swin3d_t", f"{SHIFTED} in 3-D", (1, 3, 16, 112, 112), {"window": 4}, {GLOBAL: 8}),
    full("maxvit_t", "windows, grid", (1, 3, 224, 224), {"window": 9, "grid": 9}, {GLOBAL: 4}),
)
