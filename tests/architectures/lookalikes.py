"""Models of timm that look like local attention in one respect or another and are none: nothing of them is rewritten.

Attention over channels, keys reduced in space, biases gathered as Swin does it, relative logits skewed as in a halo,
pooling and convolutions in the place of attention.
"""

from __future__ import annotations

from typing import Any

from tests.architectures.deployed import timm, timm_class
from tests.architectures.frame import Architecture, Expect, left


def xcit() -> Any:
    return timm(
        "xcit_nano_12_p16_224", img_size=(48, 64), embed_dim=24, depth=2, num_heads=3, cls_attn_layers=1
    )  # fmt: skip


def twins_pcpvt() -> Any:
    return timm(
        "twins_pcpvt_small",
        img_size=(64, 96),
        embed_dims=(16, 32),
        depths=(1, 1),
        num_heads=(2, 4),
        sr_ratios=(4, 2),
        mlp_ratios=(2, 2),
    )


def pvt_v2() -> Any:
    return timm(
        "pvt_v2_b0", depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), sr_ratios=(4, 2), mlp_ratios=(2, 2)
    )  # fmt: skip


def beit() -> Any:
    return timm("beit_base_patch16_224", img_size=(64, 96), embed_dim=24, depth=2, num_heads=3)


def levit() -> Any:
    return timm("levit_128s", img_size=(64, 64), embed_dim=(16, 24), key_dim=8, num_heads=(2, 3), depth=(1, 1))


def efficientformerv2() -> Any:
    return timm(
        "efficientformerv2_s0", img_size=(128, 128), embed_dims=(8, 16, 16, 24), depths=(1, 1, 2, 2), num_vit=1
    )  # fmt: skip


def botnet() -> Any:
    return timm("botnet26t_256", width_factor=0.25)


def poolformer() -> Any:
    metaformer = timm_class("metaformer", "MetaFormer")
    return metaformer(
        depths=(1, 1),
        dims=(8, 16),
        token_mixers=timm_class("metaformer", "Pooling"),
        norm_layers=timm_class("metaformer", "GroupNorm1"),
        num_classes=5,
    )


def mobilevitv2() -> Any:
    return timm("mobilevitv2_050")


def fastvit() -> Any:
    return timm("fastvit_sa12", embed_dims=(8, 16, 16, 32), layers=(1, 1, 1, 1))


def repvit() -> Any:
    return timm("repvit_m0_9", embed_dim=(8, 16), depth=(1, 1))


def mobileone() -> Any:
    return timm("mobileone_s0")


def everywhere(queries: int, keys: int, count: int = 1, **fields: Any) -> Expect:
    reason = f"^global attention: each of the {queries} queries attends the same {keys} keys$"
    return left("global", count, reason=reason, **fields)


REDUCED = (everywhere(384, 24, num_heads=2), everywhere(96, 24, num_heads=4))
HEADS_MIXED = "the probabilities of several heads are mixed with one another after the softmax"
ARCHITECTURES = (
    Architecture(
        "look-alike: xcit",
        xcit,
        (1, 3, 48, 64),
        (left("channel", 2, reason="channel attention"), left("global", reason="the one query attends all 13 keys")),
    ),
    Architecture("look-alike: twins_pcpvt", twins_pcpvt, (1, 3, 64, 96), REDUCED, folds=2),
    Architecture("look-alike: pvt_v2", pvt_v2, (1, 3, 64, 96), REDUCED),
    Architecture("look-alike: beit", beit, (1, 3, 64, 96), (everywhere(25, 25, 2, num_heads=3),)),
    Architecture(
        "look-alike: levit",
        levit,
        (1, 3, 64, 64),
        (everywhere(16, 16), everywhere(4, 16), everywhere(4, 4)),
        folds=1,  # the two classifiers, of which the mean is taken
    ),
    Architecture(
        "look-alike: efficientformerv2",
        efficientformerv2,
        (1, 3, 128, 128),
        (everywhere(16, 64), left("other", 2, reason=HEADS_MIXED)),
        folds=2,  # a pooled query, and the two classifiers, of which the mean is taken
    ),
    Architecture("look-alike: botnet26t", botnet, (1, 3, 256, 256), (everywhere(256, 256, 2), everywhere(64, 64))),
    Architecture("look-alike: poolformer", poolformer, (1, 3, 64, 96)),
    Architecture(
        "look-alike: mobilevitv2",
        mobilevitv2,
        (1, 3, 64, 96),
        (left("other", 9, reason=r"the logits are a linear projection \(Conv\), not a product of queries and keys"),),
    ),
    Architecture("look-alike: fastvit", fastvit, (1, 3, 64, 96), (everywhere(6, 6),), folds=14),
    Architecture("look-alike: repvit", repvit, (1, 3, 64, 96), folds=4),  # the two classifiers among them
    Architecture("look-alike: mobileone", mobileone, (1, 3, 64, 96), folds=43),
)
