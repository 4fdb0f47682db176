"""timm: small models that keep the spelling of each architecture, and named defaults at full size."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.zoo.model import TORCHSCRIPT, Kind, Model, built, imported

IMAGE = ((1, 3, 64, 96),)
SQUARE = ((1, 3, 64, 64),)
PADDED = ((1, 3, 60, 88),)


def create(name: str, **options: Any) -> Any:
    imported("timm")
    return built("timm", "create_model", name, pretrained=False, **{"num_classes": 5} | options)


def swin_sdpa(**options: Any) -> Any:
    """timm takes scaled_dot_product_attention for Swin only where that is asked for."""
    layers = imported("timm.layers")
    layers.set_fused_attn(True, experimental=True)
    return create("swin_tiny_patch4_window7_224", **options)


def samvit() -> Any:
    return create(
        "samvit_base_patch16",
        img_size=(80, 112),
        embed_dim=24,
        depth=2,
        num_heads=3,
        window_size=3,
        global_attn_indexes=(1,),
        neck_chans=16,
    )


SWIN: dict[str, Any] = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6)}
STAGES = {"embed_dims": (16, 32), "depths": (2, 2), "num_heads": (2, 4)}


MAXVIT: dict[str, Any] = {
    "embed_dim": (16, 24),
    "depths": (1, 1),
    "block_type": ("M", "M"),
    "transformer_dim_head": 8,
    "transformer_window_size": (4, 4),
    "transformer_grid_size": (4, 4),
    "stem_width": 8,
}


def m(
    name: str,
    attention: str,
    build: Any,
    inputs: Any = IMAGE,
    rewritten: dict[Kind, int] | None = None,
    left: dict[str, int] | None = None,
    **options: Any,
) -> Model:
    return Model(f"timm_{name}", "timm", attention, build, inputs, rewritten or {}, left or {}, **options)


def full(name: str, attention: str, size: int, rewritten: dict[Kind, int], left: dict[str, int]) -> Model:
    """A named model as timm builds it, through the TorchScript exporter."""
    return Model(
        name,
        "timm",
        attention,
        partial(create, name, num_classes=1000),
        ((1, 3, size, size),),
        rewritten,
        left,
        exporters=(TORCHSCRIPT,),
        full=True,
    )


SHIFTED = "shifted windows"
SWIN_T = "swin_tiny_patch4_window7_224"
GLOBAL = r"each of the \d+ queries attends the same \d+ keys"
CHANNEL = "channel attention"
MODELS = (
    m("swin", SHIFTED, partial(create, SWIN_T, img_size=(64, 96), **SWIN), rewritten={"window": 4}),
    m(
        "swin_padded",
        f"{SHIFTED}, padded map",
        partial(create, SWIN_T, img_size=(60, 88), **SWIN),
        PADDED,
        {"window": 4},
    ),
    m("swin_sdpa", f"{SHIFTED}, SDPA", partial(swin_sdpa, img_size=(64, 96), **SWIN), rewritten={"window": 4}),
    m(
        "swin_dynamic_mask",
        f"{SHIFTED}, mask computed in forward",
        partial(create, SWIN_T, img_size=(64, 96), strict_img_size=False, **SWIN),
        rewritten={"window": 4},
    ),
    m(
        "swin_s3",
        f"{SHIFTED}, sizes searched",
        partial(create, "swin_s3_tiny_224", img_size=(64, 96), **SWIN | {"window_size": (4, 2)}),
        rewritten={"window": 4},
    ),
    m(
        "swinv2",
        f"{SHIFTED}, cosine, MLP bias",
        partial(create, "swinv2_tiny_window8_256", img_size=(64, 96), **SWIN),
        rewritten={"window": 4},
    ),
    m(
        "swinv2_cr",
        f"{SHIFTED}, cosine, MLP bias, post-norm",
        partial(create, "swinv2_cr_tiny_224", img_size=(64, 96), **SWIN),
        rewritten={"window": 4},
    ),
    m(
        "maxvit",
        "windows, grid",
        partial(create, "maxvit_tiny_tf_224", img_size=(64, 96), **MAXVIT),
        rewritten={"window": 2, "grid": 2},
    ),
    m(
        "maxvit_rmlp",
        "windows, grid, MLP bias",
        partial(create, "maxvit_rmlp_pico_rw_256", img_size=(64, 96), **MAXVIT),
        rewritten={"window": 2, "grid": 2},
    ),
    m(
        "maxxvit",
        "windows, grid, channels last",
        partial(
            create, "maxxvit_rmlp_nano_rw_256", img_size=(64, 96), **MAXVIT | {"stem_width": 16, "embed_dim": (16, 32)}
        ),
        rewritten={"window": 2, "grid": 2},
    ),
    m(
        "maxxvitv2",
        "grid",
        partial(
            create, "maxxvitv2_nano_rw_256", img_size=(64, 96), **MAXVIT | {"stem_width": 16, "embed_dim": (16, 32)}
        ),
        rewritten={"grid": 2},
    ),
    m(
        "gcvit",
        "windows; windows with one global query set",
        partial(
            built,
            "timm.models.gcvit",
            "GlobalContextVit",
            img_size=(64, 96),
            window_size=((4, 6), (4, 6)),
            num_classes=5,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
        ),
        rewritten={"window": 4},
    ),
    m(
        "davit",
        "windows; channel groups",
        partial(create, "davit_tiny", window_size=4, embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 4)),
        PADDED,
        {"window": 2},
        {CHANNEL: 2},
    ),
    m(
        "twins_svt",
        "windows; spatial reduction",
        partial(
            create, "twins_svt_small", img_size=(64, 96), wss=(4, 4), sr_ratios=(4, 2), mlp_ratios=(2, 2), **STAGES
        ),
        rewritten={"window": 2},
        left={GLOBAL: 2},
    ),
    m(
        "twins_pcpvt",
        "spatial reduction",
        partial(create, "twins_pcpvt_small", img_size=(64, 96), sr_ratios=(4, 2), mlp_ratios=(2, 2), **STAGES),
        left={GLOBAL: 4},
    ),
    m(
        "volo",
        "outlook; global; class attention",
        partial(
            built,
            "timm.models.volo",
            "VOLO",
            img_size=(64, 96),
            num_classes=5,
            layers=(1, 1),
            embed_dims=(16, 32),
            num_heads=(2, 4),
            mlp_ratio=2.0,
            downsamples=(True, False),
            outlook_attention=(True, False),
            use_aux_head=False,
        ),
        rewritten={"outlook": 1},
        left={GLOBAL: 1, "the one query attends all": 2},
    ),
    m(
        "botnet",
        "global with halo-like relative logits",
        partial(create, "botnet26t_256", img_size=(128, 128)),
        ((1, 3, 128, 128),),
        left={GLOBAL: 3},
    ),
    m(
        "halonet",
        "halo windows",
        partial(create, "halonet26t", img_size=(256, 256)),
        ((1, 3, 256, 256),),
        {"halo": 2},
        {GLOBAL: 1},
    ),
    m(
        "efficientvit_msra",
        "windows, a group of the channels per head, in cascade",
        partial(
            create,
            "efficientvit_m0",
            img_size=(128, 192),
            embed_dim=(16, 32),
            key_dim=(4, 4),
            depth=(1, 1),
            num_heads=(2, 2),
            window_size=(3, 3),
            kernels=(3, 3),
        ),
        ((1, 3, 128, 192),),
        {"window": 4},
    ),
    m(
        "sam2_hiera",
        "windows; queries pooled in their window; global",
        partial(
            built,
            "timm.models.hieradet_sam2",
            "HieraDet",
            num_classes=5,
            embed_dim=16,
            num_heads=1,
            stages=(1, 2, 2, 1),
            window_spec=(8, 4, 4, 2),
            global_att_blocks=(4,),
        ),
        ((1, 3, 128, 192),),
        {"window": 5},
        {GLOBAL: 1},
    ),
    m(
        "hiera",
        "mask units; queries pooled in their unit; global",
        partial(
            built,
            "timm.models.hiera",
            "Hiera",
            img_size=(64, 96),
            embed_dim=16,
            num_heads=1,
            stages=(1, 2, 2, 1),
            num_classes=5,
        ),
        rewritten={"window": 2, "stripe": 2},
        left={GLOBAL: 2},
    ),
    m(
        "samvit",
        "windows, padded, decomposed relative position; global",
        samvit,
        ((1, 3, 80, 112),),
        {"window": 1},
        {GLOBAL: 1},
    ),
    m(
        "tnt",
        "windows kept in the batch; global",
        partial(
            create,
            "tnt_s_patch16_224",
            img_size=(48, 64),
            embed_dim=32,
            inner_dim=8,
            depth=2,
            num_heads_inner=2,
            num_heads_outer=4,
        ),
        ((1, 3, 48, 64),),
        {"window": 2},
        {GLOBAL: 2},
    ),
    m(
        "nest",
        "blocks kept in the batch",
        partial(
            built,
            "timm.models.nest",
            "Nest",
            img_size=64,
            patch_size=4,
            embed_dims=(16, 24, 32),
            num_heads=(2, 2, 2),
            depths=(1, 1, 2),
            num_classes=5,
        ),
        SQUARE,
        {"window": 2},
        {GLOBAL: 2},
    ),
    m(
        "mobilevit",
        "the same place of every patch (a grid)",
        partial(create, "mobilevit_xxs"),
        ((1, 3, 128, 192),),
        {"grid": 9},
    ),
    m("mobilevitv2", "linear attention", partial(create, "mobilevitv2_050"), ((1, 3, 128, 192),), left={"": 9}),
    m(
        "tiny_vit",
        "windows, padded; global",
        partial(
            built,
            "timm.models.tiny_vit",
            "TinyVit",
            num_classes=5,
            embed_dims=(16, 24, 32),
            depths=(1, 2, 1),
            num_heads=(2, 2, 4),
            window_sizes=(4, 4, 8),
        ),
        ((1, 3, 120, 184),),
        {"window": 3},
    ),
    m(
        "crossvit",
        "global, two branches",
        partial(
            built,
            "timm.models.crossvit",
            "CrossVit",
            img_size=48,
            img_scale=(1.0, 64 / 48),
            patch_size=(12, 16),
            embed_dim=(16, 24),
            depth=((1, 2, 0),),
            num_heads=(2, 3),
            mlp_ratio=(2.0, 2.0, 1.0),
            num_classes=5,
        ),
        ((1, 3, 48, 48),),
        left={GLOBAL: 3, "the one query attends all": 2},
    ),
    m(
        "coat",
        "factorised, convolutional relative position",
        partial(create, "coat_tiny"),
        ((1, 3, 224, 224),),
        left={"": 26},
        exporters=(TORCHSCRIPT,),
    ),
    m(
        "mvitv2",
        "global, pooled",
        partial(create, "mvitv2_tiny"),
        ((1, 3, 224, 224),),
        left={rf"{GLOBAL}|come from ScatterND": 10},  # torchscript adds the positions in place
    ),
    m("pvt_v2", "spatial reduction", partial(create, "pvt_v2_b0"), left={GLOBAL: 8}),
    m(
        "xcit",
        "channels (cross-covariance); class attention",
        partial(create, "xcit_nano_12_p16_224", depth=2),
        ((1, 3, 64, 96),),
        left={CHANNEL: 2, "the one query attends all": 2},
    ),
    m(
        "convit",
        "global, gated positional",
        partial(create, "convit_tiny", img_size=48, embed_dim=16, depth=3, num_heads=4, local_up_to_layer=2),
        ((1, 3, 48, 48),),
        left={GLOBAL: 3, "the logits are the same for every input": 2},
    ),
    m("levit", "global, bias by index", partial(create, "levit_128s"), ((1, 3, 224, 224),), left={GLOBAL: 11}),
    m("visformer", "global", partial(create, "visformer_tiny"), ((1, 3, 224, 224),), left={GLOBAL: 8}),
    m("poolformer", "none (pooling)", partial(create, "poolformer_s12"), ((1, 3, 64, 96),)),
    m("efficientvit_mit", "linear, no softmax", partial(create, "efficientvit_b0"), ((1, 3, 64, 96),)),
    m(
        "efficientformerv2",
        "global, talking heads, strided",
        partial(create, "efficientformerv2_s0"),
        ((1, 3, 224, 224),),
        left={"": 5},
    ),
    m("shvit", "global, one head", partial(create, "shvit_s1"), ((1, 3, 224, 224),), left={GLOBAL: 9}),
    m(
        "fastvit",
        "global; re-parameterised branches",
        partial(create, "fastvit_sa12"),
        ((1, 3, 128, 192),),
        left={GLOBAL: 2},
    ),
    m("repvit", "none; re-parameterised branches", partial(create, "repvit_m0_9"), ((1, 3, 64, 96),)),
    m("mobileone", "none; re-parameterised branches", partial(create, "mobileone_s0"), ((1, 3, 64, 96),)),
    m(
        "beit",
        "global, bias by index",
        partial(create, "beit_base_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=4),
        SQUARE,
        left={GLOBAL: 2},
    ),
    m(
        "vit",
        "global",
        partial(create, "vit_tiny_patch16_224", img_size=(48, 64), embed_dim=24, depth=2, num_heads=3),
        ((1, 3, 48, 64),),
        left={GLOBAL: 2},
    ),
    m("hornet_focalnet", "none (focal modulation)", partial(create, "focalnet_tiny_srf"), ((1, 3, 64, 96),)),
    m(
        "edgenext",
        "channels (cross-covariance)",
        partial(create, "edgenext_xx_small"),
        ((1, 3, 128, 192),),
        left={CHANNEL: 3},
    ),
    m(
        "nextvit",
        "spatial reduction",
        partial(create, "nextvit_small"),
        ((1, 3, 64, 96),),
        left={GLOBAL: 4},
        exporters=(TORCHSCRIPT,),
    ),
    full(SWIN_T, SHIFTED, 224, {"window": 10}, {GLOBAL: 2}),
    full("swinv2_tiny_window8_256", f"{SHIFTED}, cosine, MLP bias", 256, {"window": 10}, {GLOBAL: 2}),
    full("maxvit_tiny_tf_224", "windows, grid", 224, {"window": 9, "grid": 9}, {GLOBAL: 4}),
    full("davit_tiny", "windows; channel groups", 224, {"window": 5}, {CHANNEL: 6, GLOBAL: 1}),
    full(
        "gcvit_xxtiny",
        "windows; windows with one global query set",
        224,
        {"window": 4},
        {GLOBAL: 8},
    ),
    full("twins_svt_small", "windows; spatial reduction", 224, {"window": 7}, {GLOBAL: 11}),
    full("efficientvit_m2", "windows, cascaded groups", 224, {"window": 4}, {GLOBAL: 12}),
)
