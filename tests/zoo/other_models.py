"""Packages of a few models each: einops spellings, the originals of SAM, optical flow, segmentation, text."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.zoo.model import TORCHSCRIPT, Kind, Model, Shape, adapted, built, imported, imported_alone

SHIFTED = "shifted windows"
GLOBAL = r"each of the \d+ queries attends the same \d+ keys"
IMAGE: tuple[Shape, ...] = ((1, 3, 64, 96),)
SQUARE: tuple[Shape, ...] = ((1, 3, 64, 64),)
PAIR: tuple[Shape, ...] = ((1, 32, 16, 24), (1, 32, 16, 24))


def vp(module: str, name: str, **options: Any) -> Any:
    return built(f"vit_pytorch.{module}", name, **options)


def local_attention_1d() -> Any:
    module = imported("local_attention").LocalAttention(dim=16, window_size=8, look_backward=1, look_forward=1)
    return adapted(module, lambda attention, x: attention(x, x, x))


def local_transformer() -> Any:
    return imported("local_attention").LocalTransformer(
        num_tokens=50, dim=16, depth=2, heads=2, dim_head=8, local_attn_window_size=8, max_seq_len=64
    )


def sam_meta() -> Any:
    return imported("segment_anything.modeling.image_encoder").ImageEncoderViT(
        img_size=80,
        embed_dim=24,
        depth=2,
        num_heads=3,
        out_chans=16,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )


def sam2_meta() -> Any:
    module = imported_alone("sam2.modeling.backbones.hieradet")
    hiera = module.Hiera(
        embed_dim=16, stages=(1, 2, 2, 1), window_spec=(8, 4, 4, 2), global_att_blocks=(4,), return_interm_layers=False
    )
    return adapted(hiera, lambda trunk, x: trunk(x)[-1])


def studiosr(module: str, name: str, **options: Any) -> Any:
    return getattr(imported_alone(f"studiosr.models.{module}", absent=("gdown", "requests")), name)(**options)


def gmflow_transformer() -> Any:
    module = imported_alone("ptlflow.models.gmflow.transformer")
    net = module.FeatureTransformer(num_layers=2, d_model=32)
    return adapted(net, lambda transformer, a, b: transformer(a, b, attn_num_splits=2)[0])


def gmflow_propagation() -> Any:
    module = imported_alone("ptlflow.models.gmflow.transformer")
    net = module.FeatureFlowAttention(32)
    return adapted(net, lambda attention, a, flow: attention(a, flow, local_window_attn=True, local_window_radius=1))


def unimatch_propagation() -> Any:
    module = imported_alone("ptlflow.models.unimatch.attention")
    net = module.SelfAttnPropagation(32)
    return adapted(net, lambda attention, a, flow: attention(a, flow, local_window_attn=True, local_window_radius=1))


def unimatch_transformer(kind: str) -> Any:
    module = imported_alone("ptlflow.models.unimatch.transformer")
    net = module.FeatureTransformer(num_layers=2, d_model=32)
    return adapted(net, lambda transformer, a, b: transformer(a, b, attn_type=kind, attn_num_splits=2)[0])


def swin_unetr() -> Any:
    return imported("monai.networks.nets").SwinUNETR(
        in_channels=1, out_channels=2, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), feature_size=12, spatial_dims=2
    )


def swin_unetr_3d() -> Any:
    return imported("monai.networks.nets").SwinUNETR(
        in_channels=1, out_channels=2, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), feature_size=12, spatial_dims=3
    )


def m(
    name: str,
    package: str,
    attention: str,
    build: Any,
    inputs: tuple[Shape, ...] = IMAGE,
    rewritten: dict[Kind, int] | None = None,
    left: dict[str, int] | None = None,
    **options: Any,
) -> Model:
    return Model(name, package, attention, build, inputs, rewritten or {}, left or {}, **options)


MODELS = (
    m(
        "vp_crossformer",
        "vit_pytorch",
        "windows; dilated windows (a grid); MLP bias",
        partial(
            vp,
            "crossformer",
            "CrossFormer",
            num_classes=5,
            dim=(64, 64, 64, 64),
            depth=(1, 1, 1, 1),
            global_window_size=(4, 2, 2, 1),
            local_window_size=(4, 4, 2, 1),
        ),
        SQUARE,
        {"window": 3, "grid": 3},
        {"one key alone": 2},
    ),
    m(
        "vp_nest",
        "vit_pytorch",
        "blocks kept in the batch",
        partial(
            vp,
            "nest",
            "NesT",
            image_size=64,
            patch_size=4,
            dim=16,
            heads=2,
            num_hierarchies=3,
            block_repeats=(1, 1, 1),
            num_classes=5,
        ),
        SQUARE,
        {"window": 2},
        {GLOBAL: 1},
    ),
    m(
        "vp_maxvit",
        "vit_pytorch",
        "windows, grid",
        partial(
            vp, "max_vit", "MaxViT", num_classes=5, dim_conv_stem=8, dim=16, dim_head=8, depth=(1, 1), window_size=4
        ),
        SQUARE,
        {"window": 2, "grid": 2},
    ),
    m(
        "vp_maxvit_registers",
        "vit_pytorch",
        "windows and grid with register tokens",
        partial(
            vp,
            "max_vit_with_registers",
            "MaxViT",
            num_classes=5,
            dim_conv_stem=8,
            dim=16,
            dim_head=8,
            depth=(1, 1),
            window_size=4,
            num_register_tokens=2,
        ),
        SQUARE,
        {"window": 2, "grid": 2},
    ),
    m(
        "vp_twins_svt",
        "vit_pytorch",
        "windows; spatial reduction",
        partial(
            vp,
            "twins_svt",
            "TwinsSVT",
            num_classes=5,
            **{f"s{k}_emb_dim": 16 for k in (1, 2, 3, 4)},
            **{f"s{k}_local_patch_size": 2 for k in (1, 2, 3, 4)},
            **{f"s{k}_global_k": 2 for k in (1, 2, 3, 4)},
            s3_depth=1,
            s4_depth=1,
        ),
        SQUARE,
        {"window": 6},
        {f"{GLOBAL}|one key alone": 8},
    ),
    m(
        "vp_mobilevit",
        "vit_pytorch",
        "the same place of every patch (a grid)",
        partial(
            vp,
            "mobile_vit",
            "MobileViT",
            image_size=(128, 128),
            dims=[16, 24, 32],
            channels=[8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 32],
            num_classes=5,
        ),
        ((1, 3, 128, 128),),
        {"grid": 9},
    ),
    m(
        "vp_sepvit",
        "vit_pytorch",
        "windows with a token of their own; among windows",
        partial(vp, "sep_vit", "SepViT", num_classes=5, dim=16, dim_head=8, heads=(1, 2), depth=(1, 1)),
        ((1, 3, 56, 56),),
        {"window": 1},
        {"": 2},
    ),
    m(
        "vp_regionvit",
        "vit_pytorch",
        "windows with a regional token; global among regions",
        partial(
            vp,
            "regionvit",
            "RegionViT",
            num_classes=5,
            dim=(16, 24, 32, 32),
            depth=(1, 1, 1, 1),
            window_size=2,
        ),
        SQUARE,
        {"window": 3},
        {"": 5},
    ),
    m(
        "vp_scalablevit",
        "vit_pytorch",
        "spatial reduction; windows with a convolution of the values",
        partial(
            vp,
            "scalable_vit",
            "ScalableViT",
            num_classes=5,
            dim=16,
            depth=(1, 1),
            heads=(2, 2),
            reduction_factor=(4, 2),
            window_size=(4, 4),
        ),
        SQUARE,
        {"window": 2},
        {"": 2},
    ),
    m(
        "vp_cvt",
        "vit_pytorch",
        "global, projected by convolutions",
        partial(vp, "cvt", "CvT", num_classes=5, s1_emb_dim=16, s2_emb_dim=24, s3_emb_dim=32, s2_depth=1, s3_depth=1),
        SQUARE,
        left={GLOBAL: 3},
    ),
    m(
        "vp_lsa_vit",
        "vit_pytorch",
        "global, a query's own key masked",
        partial(
            vp,
            "vit_for_small_dataset",
            "ViT",
            image_size=64,
            patch_size=16,
            num_classes=5,
            dim=16,
            depth=2,
            heads=2,
            mlp_dim=32,
        ),
        SQUARE,
        left={"": 2},
    ),
    m(
        "halonet_pytorch",
        "halonet_pytorch",
        "halo windows, masked border, relative logits",
        partial(built, "halonet_pytorch", "HaloAttention", dim=16, block_size=4, halo_size=2, dim_head=8, heads=2),
        ((1, 16, 8, 16),),
        {"halo": 1},
    ),
    m(
        "local_attention_1d",
        "local_attention",
        "1-D windows that look one window around, rotary",
        local_attention_1d,
        ((1, 64, 16),),
        left={"one pixel needs two values": 1},  # keys are rotated by their place in each of two windows
    ),
    m(
        "local_transformer",
        "local_attention",
        "1-D causal windows that look back",
        local_transformer,
        ((1, 64),),
        left={"in one axis with heads": 2},  # heads folded into the batch where keys are rotated
        ids=50,
    ),
    m(
        "bottleneck_pytorch",
        "bottleneck_transformer_pytorch",
        "global with relative logits",
        partial(
            built,
            "bottleneck_transformer_pytorch",
            "BottleStack",
            dim=16,
            fmap_size=8,
            dim_out=32,
            num_layers=2,
            heads=2,
            dim_head=8,
            rel_pos_emb=True,
            downsample=False,
        ),
        ((1, 16, 8, 8),),
        left={GLOBAL: 2},
    ),
    m(
        "sam_meta",
        "segment_anything",
        "windows, padded, decomposed relative position; global",
        sam_meta,
        ((1, 3, 80, 80),),
        {"window": 1},
        {GLOBAL: 1},
    ),
    m(
        "sam2_meta",
        "sam2",
        "windows; queries pooled in their window; global",
        sam2_meta,
        ((1, 3, 128, 192),),
        {"window": 5},
        {GLOBAL: 1},
    ),
    m(
        "studiosr_swinir",
        "studiosr",
        f"{SHIFTED}, mask computed in forward",
        partial(studiosr, "swinir", "SwinIR", scale=2, embed_dim=24, depths=[2], num_heads=[3]),
        ((1, 3, 32, 48),),
        {"window": 2},
    ),
    m(
        "studiosr_hat",
        "studiosr",
        f"{SHIFTED}; overlapping windows",
        partial(
            studiosr, "hat", "HAT", scale=2, embed_dim=24, depths=[2], num_heads=[3], window_size=8, squeeze_factor=6
        ),
        ((1, 3, 32, 48),),
        {"window": 2, "halo": 1},
    ),
    m(
        "studiosr_swinfir",
        "studiosr",
        f"{SHIFTED} beside Fourier units",
        partial(studiosr, "swinfir", "SwinFIR", scale=2, embed_dim=24, depths=[2], num_heads=[3]),
        ((1, 3, 32, 48),),
        {"window": 2},
    ),
    m(
        "studiosr_maxsr",
        "studiosr",
        "windows, grid",
        partial(studiosr, "maxsr", "MaxSR", scale=2, dim=16, dim_head=8, depth=[1], adaptive=False),
        ((1, 3, 64, 64),),
        {"window": 1, "grid": 1},
    ),
    m("gmflow_transformer", "ptlflow", f"{SHIFTED} by count, of two maps", gmflow_transformer, PAIR, {"window": 4}),
    m(
        "gmflow_propagation",
        "ptlflow",
        "3 x 3 neighbourhood of another map's values",
        gmflow_propagation,
        ((1, 32, 16, 24), (1, 2, 16, 24)),
        {"neighborhood": 1},
    ),
    m(
        "unimatch_propagation",
        "ptlflow",
        "3 x 3 neighbourhood of another map's values",
        unimatch_propagation,
        ((1, 32, 16, 24), (1, 2, 16, 24)),
        {"neighborhood": 1},
    ),
    m(
        "unimatch_swin",
        "ptlflow",
        f"{SHIFTED} by count, of two maps",
        partial(unimatch_transformer, "swin"),
        PAIR,
        {"window": 4},
    ),
    m(
        "unimatch_stereo",
        "ptlflow",
        f"{SHIFTED}; whole rows of the other map",
        partial(unimatch_transformer, "self_swin2d_cross_1d"),
        PAIR,
        {"window": 2, "stripe": 2},
    ),
    m("monai_swin_unetr", "monai", f"{SHIFTED}, U-Net", swin_unetr, ((1, 1, 64, 96),), {"window": 6}, {GLOBAL: 2}),
    m(
        "monai_swin_unetr_3d",
        "monai",
        f"{SHIFTED} in 3-D, U-Net",
        swin_unetr_3d,
        ((1, 1, 32, 32, 64),),
        {"window": 3, "stripe": 1},
        {GLOBAL: 1},
        exporters=(TORCHSCRIPT,),
    ),
    m(
        "basicsr_swinir",
        "basicsr",
        SHIFTED,
        partial(
            built,
            "basicsr.archs.swinir_arch",
            "SwinIR",
            img_size=32,
            embed_dim=24,
            depths=(2,),
            num_heads=(3,),
            window_size=8,
        ),
        ((1, 3, 32, 48),),
        {"window": 2},
    ),
    m(
        "mmpretrain_swin",
        "mmpretrain",
        SHIFTED,
        partial(built, "mmpretrain.models", "SwinTransformer", arch="tiny"),
        ((1, 3, 224, 224),),
        {"window": 10},
        {GLOBAL: 2},
    ),
    m(
        "natten_neighborhood",
        "natten",
        "neighbourhood, inward border",
        partial(built, "natten", "NeighborhoodAttention2D", embed_dim=24, num_heads=3, kernel_size=3),
        ((1, 16, 24, 24),),
        {"neighborhood": 1},
    ),
)
