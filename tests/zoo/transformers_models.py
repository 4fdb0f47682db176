"""transformers: each from a small configuration."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.zoo.model import Kind, Model, Shape, adapted, imported

SHIFTED = "shifted windows"
GLOBAL = r"each of the \d+ queries attends the same \d+ keys"
STAGES: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}
IMAGE = (64, 96)


def hf(model: str, config: str, output: str = "last_hidden_state", **options: Any) -> Any:
    """transformers' `model` of a `config`, from its first input to one of its outputs."""
    attention = options.pop("attention", None)
    transformers = imported("transformers")
    settings = getattr(transformers, config)(**options)
    if attention is not None:
        settings._attn_implementation = attention
    return adapted(getattr(transformers, model)(settings), lambda module, x: getattr(module(x), output))


def clap_audio() -> Any:
    transformers = imported("transformers")
    config = transformers.ClapAudioConfig(
        patch_embeds_hidden_size=24,
        depths=[2, 2],
        num_attention_heads=[3, 6],
        window_size=4,
        spec_size=128,
        num_mel_bins=32,
        hidden_size=48,
        enable_fusion=False,
    )
    return adapted(transformers.ClapAudioModel(config), lambda module, x: module(x).last_hidden_state)


def sam(**options: Any) -> Any:
    transformers = imported("transformers")
    config = transformers.SamVisionConfig(
        hidden_size=24,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=80,
        patch_size=16,
        window_size=3,
        global_attn_indexes=[1],
        mlp_dim=48,
        **options,
    )
    return adapted(transformers.SamVisionModel(config), lambda module, x: module(x).last_hidden_state)


def sam2() -> Any:
    transformers = imported("transformers")
    config = transformers.Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=1,
        image_size=[128, 192],
        blocks_per_stage=[1, 2, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[4],
    )
    return adapted(transformers.Sam2HieraDetModel(config), lambda module, x: module(x).last_hidden_state)


def mobilevit(model: str) -> Any:
    transformers = imported("transformers")
    options: dict[str, Any] = {"image_size": 128, "num_labels": 5}
    if model == "MobileViT":
        options |= {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 16],
            "num_attention_heads": 2,
        }
    config = getattr(transformers, f"{model}Config")(**options)
    return adapted(getattr(transformers, f"{model}ForImageClassification")(config), lambda module, x: module(x).logits)


def longt5(kind: str) -> Any:
    transformers = imported("transformers")
    config = transformers.LongT5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        local_radius=7,
        global_block_size=8,
        encoder_attention_type=kind,
    )
    return adapted(
        transformers.LongT5EncoderModel(config),
        lambda module, x: module(input_ids=x, attention_mask=x.new_ones(x.shape)).last_hidden_state,
    )


def longformer() -> Any:
    transformers = imported("transformers")
    config = transformers.LongformerConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        attention_window=[16, 16],
        max_position_embeddings=132,
    )
    return adapted(transformers.LongformerModel(config), lambda module, x: module(input_ids=x).last_hidden_state)


def m(
    name: str,
    attention: str,
    build: Any,
    inputs: tuple[Shape, ...] = ((1, 3, 64, 96),),
    rewritten: dict[Kind, int] | None = None,
    left: dict[str, int] | None = None,
    **options: Any,
) -> Model:
    return Model(f"hf_{name}", "transformers", attention, build, inputs, rewritten or {}, left or {}, **options)


MODELS = (
    m("swin", SHIFTED, partial(hf, "SwinModel", "SwinConfig", image_size=IMAGE, **STAGES), rewritten={"window": 4}),
    m(
        "swin_eager",
        f"{SHIFTED}, written out",
        partial(hf, "SwinModel", "SwinConfig", image_size=IMAGE, attention="eager", **STAGES),
        rewritten={"window": 4},
    ),
    m(
        "swin_padded",
        f"{SHIFTED}, padded map",
        partial(hf, "SwinModel", "SwinConfig", image_size=(60, 88), **STAGES),
        ((1, 3, 60, 88),),
        {"window": 4},
    ),
    m(
        "swinv2",
        f"{SHIFTED}, cosine, MLP bias",
        partial(hf, "Swinv2Model", "Swinv2Config", image_size=IMAGE, **STAGES),
        rewritten={"window": 4},
    ),
    m(
        "swin2sr",
        f"{SHIFTED}, cosine, MLP bias, super-resolution",
        partial(
            hf, "Swin2SRForImageSuperResolution", "Swin2SRConfig", "reconstruction", image_size=32, upscale=2, **STAGES
        ),
        ((1, 3, 32, 48),),
        {"window": 4},
    ),
    m(
        "donut_swin",
        SHIFTED,
        partial(hf, "DonutSwinModel", "DonutSwinConfig", image_size=IMAGE, **STAGES),
        rewritten={"window": 4},
    ),
    m(
        "maskformer_swin",
        SHIFTED,
        partial(hf, "MaskFormerSwinModel", "MaskFormerSwinConfig", image_size=IMAGE, **STAGES),
        rewritten={"window": 4},
    ),
    m("clap_audio", f"{SHIFTED} over a spectrogram", clap_audio, ((1, 1, 401, 32),), {"window": 4}),
    m(
        "sam_vision",
        "windows, padded, decomposed relative position; global",
        sam,
        ((1, 3, 80, 80),),
        {"window": 1},
        {GLOBAL: 1},
    ),
    m(
        "sam2_vision",
        "windows; queries pooled in their window; global",
        sam2,
        ((1, 3, 128, 192),),
        {"window": 5},
        {GLOBAL: 1},
    ),
    m(
        "vitdet",
        "windows, padded, decomposed relative position; global",
        partial(
            hf,
            "VitDetModel",
            "VitDetConfig",
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=80,
            patch_size=16,
            window_block_indices=[0],
            window_size=3,
            use_relative_position_embeddings=True,
        ),
        ((1, 3, 80, 80),),
        {"window": 1},
        {GLOBAL: 1},
    ),
    m(
        "mobilevit",
        "the same place of every patch (a grid)",
        partial(mobilevit, "MobileViT"),
        ((1, 3, 128, 128),),
        {"grid": 9},
    ),
    m("mobilevitv2", "linear attention", partial(mobilevit, "MobileViTV2"), ((1, 3, 128, 128),), left={"": 9}),
    m(
        "groupvit",
        "global; groups",
        partial(
            hf,
            "GroupViTVisionModel",
            "GroupViTVisionConfig",
            hidden_size=24,
            intermediate_size=48,
            depths=[1, 2, 1],
            num_group_tokens=[8, 4, 0],
            num_output_groups=[8, 4, 0],
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
        ),
        ((1, 3, 64, 64),),
        left={"": 8},
    ),
    m(
        "cvt",
        "global, projected by convolutions",
        partial(hf, "CvtModel", "CvtConfig"),
        left={GLOBAL: 13},
    ),
    m("longformer", "1-D band by overlapping chunks", longformer, ((1, 64),), {"window": 2}, ids=50),
    m(
        "longt5_local",
        "1-D blocks that look one block around",
        partial(longt5, "local"),
        ((1, 64),),
        {"halo": 2},
        ids=50,
    ),
    m(
        "longt5_tglobal",
        "1-D blocks that look around, and global summaries",
        partial(longt5, "transient-global"),
        ((1, 64),),
        {"halo": 2},
        ids=50,
    ),
    m(
        "beit",
        "global, bias by index",
        partial(
            hf,
            "BeitModel",
            "BeitConfig",
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=64,
            intermediate_size=48,
            use_relative_position_bias=True,
        ),
        ((1, 3, 64, 64),),
        left={GLOBAL: 2},
    ),
    m(
        "dinat",
        "dilated neighbourhood (natten)",
        partial(hf, "DinatModel", "DinatConfig", embed_dim=16, depths=[2, 2], num_heads=[2, 4], kernel_size=3),
        rewritten={"neighborhood": 4},
    ),
    m(
        "focalnet",
        "none (focal modulation)",
        partial(hf, "FocalNetModel", "FocalNetConfig", image_size=64, embed_dim=16, depths=[1, 1]),
        ((1, 3, 64, 64),),
    ),
    m(
        "segformer",
        "spatial reduction",
        partial(
            hf,
            "SegformerModel",
            "SegformerConfig",
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 24, 32],
            num_attention_heads=[1, 2, 3, 4],
        ),
        left={GLOBAL: 4},
    ),
    m(
        "poolformer",
        "none (pooling)",
        partial(hf, "PoolFormerModel", "PoolFormerConfig", depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32]),
    ),
    m(
        "hiera",
        "mask units; queries pooled in their unit; global",
        partial(
            hf,
            "HieraModel",
            "HieraConfig",
            embed_dim=16,
            image_size=[64, 96],
            num_heads=[1, 2, 4, 8],
            depths=[1, 2, 2, 1],
        ),
        rewritten={"window": 2, "stripe": 2},
        left={GLOBAL: 2},
    ),
)
