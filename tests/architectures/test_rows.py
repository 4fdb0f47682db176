"""Every row of the table of architectures has its models, and they expect the verdict that the table demands."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from tests.architectures.test_table import ARCHITECTURES

# Rows that people name, and what is to be said of their softmaxes over all models of the row: R a rewrite, L a softmax
# left, each with its kind; F that branches fold (which may happen in other rows as well). A stripe is a window as long
# as the map.
ROWS: dict[str, set[str]] = {
    "Slide-Transformer": {"R neighborhood", "F"},
    "(its baseline) SASA / Im2Col attention": {"R neighborhood"},
    "Flash Window Attention / Swin": {"R window"},
    "DaViT": {"R window", "L channel"},
    "S2AFormer": {"L global"},
    "L2ViT": {"R window"},
    "DualToken-ViT": {"L global"},
    "BEVANet": {"F"},
    "DuoFormer": {"R window", "L global"},
    "MAFormer": {"R window", "L global"},
    "DiNAT / NAT": {"R neighborhood"},
    "CrossViT": {"L global"},
    "GC ViT": {"R window"},
    "Sparsifiner": {"L global"},
    "Super Token Sampling": {"L other", "L global"},
    "StyleSwin": {"R window"},
    "DRCT": {"R window"},
    "PPMA (polyline path mask)": {"L global"},
    "CrossFormer": {"R window", "R grid"},
    "SHViT": {"L global"},
    "Transformer in Transformer": {"R window", "L global"},
    "Multi-dimensional Hyena": set(),
    "MaxViT": {"R window", "R grid"},
    "HAT": {"R window", "R halo"},
    "UniFormer": {"L global", "F"},
    "BiFormer": {"L other"},
    "CoSwin": {"R window"},
    "FreeSwim": {"R neighborhood"},
    "TransFER": {"L global"},
    "SG-Former": {"R window", "L global"},
    "TGBFormer": {"L global"},
    "DLGSANet": {"R outlook", "L other"},
    "InLine attention": set(),
    "VCMamba, HorNet": set(),
    "HBFormer": {"R window"},
    "CARE Transformer": set(),
    "A2Mamba": {"R neighborhood"},
    "TiC (MSA-Conv)": {"R window", "L other"},
    "EViT (token reorganisation), IA-RED2": {"L global"},
    "ELA": set(),
    "FcaFormer": {"L global"},
    "Visual analytics of ViT, OAT": {"L global"},
    "ConViT": {"L global", "L other"},
    "BinaryAttention": {"L global"},
    "FaViT": {"R window", "R grid"},
    "Small-dataset hybrid (DHVT)": {"L global"},
    "LookupViT": {"L global"},
    "RetNet through convolution (GMM mask)": {"L global"},
    "Brain-Score dual-stream": {"L global"},
    "VOLO": {"R outlook", "L global"},
    "EfficientViT (MSRA)": {"R window", "L global"},
    "CroCo v2": {"L global"},
    "STViT (token sparsification)": {"R window", "L global"},
    "Visual Dependency Transformers": {"L other"},
    "Local Linear Attention": {"L other"},
    "UniFormerV2": {"L global"},
    "Agent Attention": {"R window", "L global"},
    "Softmax-free (SOFT)": set(),
    "UPLiFT": {"R outlook"},
}


def expected_of(row: str) -> set[str]:
    models = [a for a in ARCHITECTURES.values() if a.row == row]
    assert models, f"no model of the row {row}"
    said = {
        f"{'R' if e.fields['verdict'] == 'rewrite' else 'L'} {e.fields['kind']}"
        for model in models
        for e in model.sites
    }
    return said | {"F"} if any(model.folds for model in models) else said


def test_there_are_59_rows() -> None:
    assert len(ROWS) == 59


@pytest.mark.parametrize("row", ROWS)
def test_the_models_of_a_row_expect_its_verdicts(row: str) -> None:
    said = expected_of(row)
    assert said - {"F"} == ROWS[row] - {"F"}
    assert "F" in said or "F" not in ROWS[row]


def test_other_models_say_what_they_are() -> None:
    rows = {a.row for a in ARCHITECTURES.values()} - ROWS.keys()
    assert all(row.startswith(("deployed: ", "look-alike: ")) for row in rows), rows
