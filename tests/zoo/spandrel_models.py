"""spandrel's super-resolution and restoration models, with few blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.zoo.model import Kind, Model, Shape, built

SHIFTED = "shifted windows"
GLOBAL = r"each of the \d+ queries attends the same \d+ keys"
CHANNEL = "channel attention"
IMAGE: tuple[Shape, ...] = ((1, 3, 32, 48),)
RSTB: dict[str, Any] = {
    "img_size": 32,
    "embed_dim": 24,
    "depths": (2,),
    "num_heads": (3,),
    "window_size": 8,
    "mlp_ratio": 2,
}
UPSCALE: dict[str, Any] = {"upscale": 2, "upsampler": "pixelshuffle"}


def sp(architecture: str, name: str = "", module: str = "", **options: Any) -> Any:
    """`name` of spandrel.architectures.ARCHITECTURE."""
    where = f"spandrel.architectures.{architecture}" + (f".__arch.{module}" if module else "")
    return built(where, name or architecture, **options)


def m(
    name: str,
    attention: str,
    build: Any,
    rewritten: dict[Kind, int] | None = None,
    left: dict[str, int] | None = None,
    inputs: tuple[Shape, ...] = IMAGE,
    package: str = "spandrel",
) -> Model:
    return Model(f"sp_{name}", package, attention, build, inputs, rewritten or {}, left or {})


MODELS = (
    m("swinir", SHIFTED, partial(sp, "SwinIR", **RSTB, **UPSCALE), {"window": 2}),
    m(
        "swinir_offgrid",
        f"{SHIFTED}, padded by reflection, mask recomputed",
        partial(sp, "SwinIR", **RSTB, **UPSCALE),
        {"window": 2},
        inputs=((1, 3, 28, 44),),
    ),
    m("swin2sr", f"{SHIFTED}, cosine, MLP bias", partial(sp, "Swin2SR", **RSTB, **UPSCALE), {"window": 2}),
    m(
        "hat",
        f"{SHIFTED}; overlapping windows; channels (sigmoid)",
        partial(sp, "HAT", **RSTB, **UPSCALE, compress_ratio=3, squeeze_factor=6),
        {"window": 2, "halo": 1},
    ),
    m(
        "drct",
        f"{SHIFTED}, dense",
        partial(sp, "DRCT", **RSTB, **UPSCALE, gc=8),
        {"window": 5},
    ),
    m(
        "uformer",
        f"{SHIFTED}, U-Net, mask computed in forward",
        partial(
            sp,
            "Uformer",
            img_size=64,
            embed_dim=8,
            depths=[2] * 9,
            num_heads=[1, 2, 2, 2, 2, 2, 2, 2, 1],
            win_size=4,
        ),
        {"window": 16},
        {GLOBAL: 2},
        inputs=((1, 3, 64, 64),),
    ),
    m(
        "dctlsa",
        "linear attention in windows",
        partial(sp, "DCTLSA"),
        {},
        {"a linear projection": 24},
        inputs=((1, 3, 64, 64),),
    ),
    m(
        "ipt",
        "global on unfolded patches",
        partial(sp, "IPT", n_feats=8, patch_size=12, num_heads=2, num_layers=1),
        {},
        {GLOBAL: 3},
        inputs=((1, 3, 12, 12),),
    ),
    m(
        "fftformer",
        "none (frequency domain)",
        partial(sp, "FFTformer", dim=8, num_blocks=[1, 1, 1], num_refinement_blocks=1),
        inputs=((1, 3, 64, 64),),
    ),
    m(
        "craft",
        "windows of two shapes; channels",
        partial(sp, "CRAFT", embed_dim=64, depths=[2], num_heads=[2], window_size=16, upscale=2),
        {"window": 8},
        {CHANNEL: 2},
        inputs=((1, 3, 32, 48),),
    ),
    m(
        "dat",
        "windows of two shapes, shifted; channels",
        partial(
            sp, "DAT", img_size=32, embed_dim=64, split_size=[4, 8], depth=[4], num_heads=[2], expansion_factor=2.0
        ),
        {"window": 4},
        {CHANNEL: 2},
    ),
    m(
        "fdat",
        "windows; channels",
        partial(
            sp,
            "FDAT",
            embed_dim=24,
            num_groups=1,
            depth_per_group=2,
            num_heads=2,
            window_size=8,
            scale=2,
            upsampler_type="pixelshuffle",
        ),
        {"window": 2},
        {CHANNEL: 2},
    ),
    m(
        "grl",
        f"{SHIFTED}; stripes through anchors",
        partial(
            sp,
            "GRL",
            img_size=32,
            embed_dim=24,
            depths=[2],
            num_heads_window=[2],
            num_heads_stripe=[2],
            window_size=8,
            stripe_size=[8, 8],
            upscale=2,
            upsampler="pixelshuffledirect",
            mlp_ratio=2,
        ),
        {"window": 2},
        {"": 4},
        inputs=((1, 3, 32, 48),),
    ),
    m(
        "atd",
        f"{SHIFTED}; categories and a dictionary of tokens",
        partial(
            sp,
            "ATD",
            img_size=32,
            embed_dim=24,
            depths=(2,),
            num_heads=(3,),
            window_size=8,
            category_size=32,
            num_tokens=16,
            **UPSCALE,
        ),
        {"window": 2},
        {"": 4},
    ),
    m(
        "rgt",
        "windows of two shapes; recursive global",
        partial(sp, "RGT", img_size=32, embed_dim=64, depth=[4], num_heads=[2], mlp_ratio=2, split_size=[4, 8]),
        {"window": 4},
        {"": 2},
    ),
    m(
        "omnisr",
        "windows and grid; channels of both",
        partial(sp, "OmniSR", num_feat=16, block_num=1, res_num=1, window_size=8, up_scale=2),
        {"window": 1, "grid": 1},
        {"": 2},
    ),
    m(
        "scunet",
        "windows, shifted, beside convolutions",
        partial(sp, "SCUNet", in_nc=3, config=[2] * 7, dim=64, input_resolution=64),
        {"window": 12},
        {GLOBAL: 2},
        inputs=((1, 3, 64, 64),),
    ),
    m(
        "ditn",
        "windows; channels",
        partial(sp, "DITN", "DITN_Real", "DITN_Real", dim=12, ITL_blocks=1, SAL_blocks=1, upscale=2),
        {},
        {"": 1},
    ),
    m(
        "restormer",
        "channels (transposed)",
        partial(
            built,
            "spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch",
            "Restormer",
            dim=8,
            num_blocks=[1, 1, 1, 1],
            num_refinement_blocks=1,
            heads=[1, 2, 4, 8],
            ffn_expansion_factor=2.0,
        ),
        {},
        {CHANNEL: 8},
        inputs=((1, 3, 64, 64),),
        package="spandrel_extra_arches",
    ),
    m(
        "srformer",
        "shifted windows with permuted, fewer keys",
        partial(built, "spandrel_extra_arches.architectures.SRFormer.__arch.SRFormer", "SRFormer", **RSTB, **UPSCALE),
        {"window": 2},
        inputs=IMAGE,
        package="spandrel_extra_arches",
    ),
)
