"""Swin models made Slide-Swin: what is replaced, what it starts from, what is left and why."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from attnrewrite.errors import UserError  # noqa: E402
from attnrewrite.nn import SlideAttention  # noqa: E402
from attnrewrite.surgery import SlideBlock, windows_to_slide  # noqa: E402
from examples.exporting import import_torchvision  # noqa: E402

import_torchvision()


def timm_swin() -> Any:
    timm = pytest.importorskip("timm")
    options = {
        "img_size": 64,
        "patch_size": 4,
        "embed_dim": 12,
        "depths": (2, 2),
        "num_heads": (3, 6),
        "window_size": 4,
    }
    return timm.models.swin_transformer.SwinTransformer(**options, num_classes=5)


def torchvision_swin() -> Any:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    return swin.SwinTransformer([4, 4], 12, [2, 2], [3, 6], [4, 4], num_classes=5, stochastic_depth_prob=0.0)


MODELS = {"timm": timm_swin, "torchvision": torchvision_swin}


def images() -> Any:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_trains_after_surgery(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    replaced = windows_to_slide(model, stages=(0,))
    assert [(r.stage, r.dim, r.num_heads, r.window_size, r.kernel_size) for r in replaced] == [
        (0, 12, 3, (4, 4), (3, 3))
    ] * 2
    assert sum(isinstance(m, SlideAttention) for m in model.modules()) == 2
    assert str(replaced[0]).endswith("(stage 0, 12 channels, 3 heads): 4x4 windows -> 3x3 neighbourhoods")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images()), torch.tensor([1, 3]))
        loss.backward()
        new = [p for m in model.modules() if isinstance(m, SlideAttention) for p in m.parameters()]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in new)
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_what_was_learned_is_kept(name: str) -> None:
    """Projections, norms and MLPs under their names; biases of the offsets that a neighbourhood has."""
    torch.manual_seed(0)
    model = MODELS[name]()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    (first, _) = windows_to_slide(model, stages=(1,))
    after = model.state_dict()
    new = {n for n in after if "_shift." in n or n.endswith("position_bias")}
    assert all(torch.equal(after[n], before[n]) for n in after.keys() - new)
    gone = before.keys() - after.keys()
    assert all("relative_position" in n or "attn_mask" in n for n in gone)
    table = before[f"{first.name}.relative_position_bias_table"].view(7, 7, 6)
    bias = after[f"{first.name}.position_bias"].view(6, 3, 3)
    assert torch.equal(bias[:, 1, 1], table[3, 3])
    assert torch.equal(bias[:, 0, 2], table[4, 2])  # the key one row above and one column to the right: n - m = (1, -1)


def test_an_attention_that_sees_the_whole_neighbourhood_starts_equal() -> None:
    """A 3x3 window of a 3x3 map, seen from its middle, is the neighbourhood of the middle."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    torch.manual_seed(0)
    model = torch.nn.Sequential(swin.ShiftedWindowAttention(12, [3, 3], [0, 0], 3)).eval()
    x = torch.randn(2, 3, 3, 12)
    before = model(x)[:, 1, 1]
    windows_to_slide(model, stages=(0,))
    torch.testing.assert_close(model(x)[:, 1, 1], before, rtol=0.0, atol=1e-6)


def test_a_kernel_larger_than_the_window_has_biases_of_zero_outside() -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    model = torch.nn.Sequential(swin.ShiftedWindowAttention(12, [2, 2], [0, 0], 3))
    windows_to_slide(model, stages=(0,), kernel_size=5)
    bias = model[0].position_bias.view(3, 5, 5)
    assert (bias[:, 1:4, 1:4] != 0).all()
    assert bias[:, 0].abs().max() == bias[:, :, 4].abs().max() == 0


@pytest.mark.filterwarnings("ignore::UserWarning:timm.*")
def test_blocks_take_any_size() -> None:
    model = timm_swin()
    windows_to_slide(model, stages=(0,))
    (block, _) = [m for m in model.modules() if isinstance(m, SlideBlock)]
    assert block(torch.randn(1, 5, 9, 12)).shape == (1, 5, 9, 12)
    model.set_input_size((96, 96))
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 5)


def test_what_is_no_window_attention_is_left() -> None:
    """Nothing is replaced and the model is as it was."""
    timm = pytest.importorskip("timm")
    options = {"img_size": 64, "embed_dim": 12, "depths": (2,), "num_heads": (3,), "window_size": 4}
    second = timm.models.swin_transformer_v2.SwinTransformerV2(**options, num_classes=5)
    with pytest.raises(UserError, match=r"it divides by the norms of query and key \(Swin V2\)"):
        windows_to_slide(second)
    assert not any(isinstance(m, SlideAttention) for m in second.modules())
    with pytest.raises(UserError, match="no further module has qkv, proj and a relative position bias table"):
        windows_to_slide(torch.nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"stages \[7\]; there are stages 0 to 1"):
        windows_to_slide(timm_swin(), stages=(7,))


def test_a_block_of_another_kind_is_left() -> None:
    """Its attention takes windows, and nobody here knows how to cut them."""
    model = timm_swin()
    block = model.layers[0].blocks[0]
    block.gate = torch.nn.Linear(12, 12)
    assert [r.name for r in windows_to_slide(model, stages=(0,))] == ["layers.0.blocks.1.attn"]
    with pytest.raises(UserError, match="the block around it is none of norm, attention, norm and MLP"):
        windows_to_slide(torch.nn.ModuleDict({"only": block}), stages=(0,))
