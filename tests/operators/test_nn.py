"""The modules beside the models they stand for, on maps of any size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from attnrewrite import nn  # noqa: E402
from examples.exporting import import_torchvision  # noqa: E402
from examples.models import slide_transformer  # noqa: E402

CLOSE = {"rtol": 0.0, "atol": 2e-6}  # outputs are of order 1: sums of 49 terms, rounded to 2**-24


def map_of(*size: int, channels: int = 12) -> Any:
    return torch.randn(2, *size, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(8, 12), (7, 10), (4, 9), (3, 3)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_windows_are_those_of_torchvision(size: tuple[int, int], shift: int) -> None:
    """The same parameters by name, the same results, padded and smaller maps included."""
    import_torchvision()
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    torch.manual_seed(0)
    theirs = swin.ShiftedWindowAttention(12, [4, 4], [shift, shift], 3).eval()
    ours = nn.FlashWindowAttention(12, 3, 4, shift)
    assert ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys == []
    torch.testing.assert_close(ours(map_of(*size)), theirs(map_of(*size)), **CLOSE)


def test_slides_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    theirs, ours = slide_transformer.SlideAttention(12, 3), nn.SlideAttention(12, 3)
    state = theirs.state_dict()
    # There head h owns the channels 3*d*h to 3*d*(h+1); here queries, keys and values of all heads lie together.
    order = torch.arange(36).view(3, 3, 4).transpose(0, 1).reshape(-1)
    mine = {"qkv.weight": state["qkv.weight"][order], "qkv.bias": state["qkv.bias"][order]}
    mine |= {name: state[name] for name in ("proj.weight", "proj.bias")}
    for side in ("key_shift", "value_shift"):
        mine[f"{side}.shift"] = state[f"{side}.shift.weight"].view(4, 9, 3, 3)
        mine[f"{side}.weight"] = state[f"{side}.learned.weight"].view(4, 9, 3, 3)
        mine[f"{side}.bias"] = (state[f"{side}.shift.bias"] + state[f"{side}.learned.bias"]).view(4, 9)
    mine["position_bias"] = torch.zeros(3, 9)
    ours.load_state_dict(mine)
    torch.testing.assert_close(ours(map_of(8, 11)), theirs(map_of(8, 11)), **CLOSE)


@pytest.mark.parametrize("shared", [False, True])
def test_folding_leaves_the_function_as_it_is(shared: bool) -> None:
    torch.manual_seed(0)
    slide = nn.SlideAttention(12, 3, (3, 5), shared_shift=shared)
    for parameter in slide.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    before, names = slide(map_of(5, 6)), set(slide.state_dict())
    slide.fold().fold()
    torch.testing.assert_close(slide(map_of(5, 6)), before, **CLOSE)
    assert names - set(slide.state_dict()) == {"key_shift.shift", "value_shift.shift"}
    again = nn.SlideAttention(12, 3, (3, 5), shared_shift=shared).fold()
    again.load_state_dict(slide.state_dict())
    assert torch.equal(again(map_of(5, 6)), slide(map_of(5, 6)))


def test_learned_shifts_start_as_none() -> None:
    torch.manual_seed(0)
    deformed, plain = nn.SlideAttention(12, 3), nn.SlideAttention(12, 3, deformed=False)
    plain.load_state_dict(deformed.state_dict(), strict=False)
    torch.testing.assert_close(deformed(map_of(5, 6)), plain(map_of(5, 6)), **CLOSE)


MODULES = {
    "windows": lambda: nn.FlashWindowAttention(12, 3, 4, 2),
    "windows without biases": lambda: nn.FlashWindowAttention(12, 3, 4, qkv_bias=False, relative_position=False),
    "slides": lambda: nn.SlideAttention(12, 3),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_trains(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (module(map_of(6, 9)) - map_of(6, 9)).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("axes", [1, 3])
def test_maps_of_other_ranks(axes: int) -> None:
    x = map_of(*(5, 4, 6)[:axes])
    assert nn.FlashWindowAttention(12, 3, (2, 4, 3)[:axes], (1, 0, 1)[:axes])(x).shape == x.shape
    assert nn.SlideAttention(12, 3, (3,) * axes, deformed=False)(x).shape == x.shape


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_export(name: str) -> None:
    module = MODULES[name]().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (map_of(6, 9),), dynamic_shapes=({0: batch},))
    x = torch.cat([map_of(6, 9)] * 2)
    torch.testing.assert_close(program.module()(x), module(x), **CLOSE)


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_compile_as_one_graph(name: str) -> None:
    """With gradients, and for maps of every size once shapes are dynamic."""
    torch.manual_seed(0)
    module = MODULES[name]()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (module, compiled):
        module.zero_grad()
        function(map_of(6, 9)).square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(map_of(5, 7)), module(map_of(5, 7)))


def test_an_infinite_mask_value_survives_a_file(tmp_path: Path) -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.ops.attnrewrite.flash_window_attention(
                x, x, x, num_heads=3, scale=0.5, feature_size=[8, 8], window_size=[4, 4], shift_size=[2, 2],
                mask_value=-math.inf, softmax_dtype=torch.float64,
            )  # fmt: skip

    torch.export.save(torch.export.export(Masked(), (map_of(8, 8),)), tmp_path / "masked.pt2")
    loaded = torch.export.load(tmp_path / "masked.pt2").module()
    assert torch.equal(loaded(map_of(8, 8)), Masked()(map_of(8, 8)))


WRONG = {
    "a shift must be at least 0 and below the window": lambda: nn.FlashWindowAttention(12, 3, 4, 4),
    "the heads must divide the channels": lambda: nn.SlideAttention(12, 5),
    "a neighbourhood needs odd sizes": lambda: nn.SlideAttention(12, 3, 4),
    "2 spatial axes and 12 channels at the end": lambda: nn.SlideAttention(12, 3)(map_of(5)),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_does_not_fit_is_told(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        WRONG[sentence]()
