"""PyTorch models in `attnrewrite.optimize`: rewritten, still theirs, still trainable."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import attnrewrite
from attnrewrite import modules
from attnrewrite.errors import UserError
from examples.models.swin import Swin
from examples.models.unfold_attention import UnfoldAttention

IMAGE = (2, 3, 32, 48)


def scaled_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of max |expected|."""
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def swin() -> nn.Module:
    torch.manual_seed(0)
    model = Swin(IMAGE[2:], dim=12, depths=(2,), num_heads=(3,), window_size=4, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def kinds(result: attnrewrite.api.ModuleResult) -> list[tuple[str, str]]:
    return [(site.kind, site.verdict) for site in result.report.sites]


REWRITTEN = [("window", "rewrite")] * 2


@pytest.mark.parametrize("freeze", [True, False])
def test_a_module(freeze):
    model, x = swin(), torch.randn(IMAGE)
    result = attnrewrite.optimize(model, (x,), freeze=freeze, compile=False)
    assert kinds(result) == REWRITTEN
    assert result.verification is not None and result.verification.max_error("rewritten") < 1e-5
    assert set(result.module.state_dict()) == set(model.state_dict())
    operators = [
        str(n.target) for n in result.module.graph.nodes if n.op == "call_function" and "attention" in str(n.target)
    ]
    assert operators == ["attnrewrite.flash_window_attention.default"] * 2
    x = torch.randn(IMAGE)
    assert scaled_error(result.module(x), model(x)) < 1e-5


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_16_bits(dtype, freeze):
    """Both windows, as in float32; no further from what the model means than it was itself, but for a rounding."""
    model, x = swin().to(dtype), torch.randn(IMAGE).to(dtype)
    result = attnrewrite.optimize(model, (x,), freeze=freeze, compile=False)
    assert kinds(result) == REWRITTEN
    reference = swin().double()
    with torch.no_grad():
        off = [scaled_error(m(x).double(), reference(x.double())) for m in (result.module, model)]
    assert off[0] <= 1.5 * off[1] + torch.finfo(dtype).eps


def test_gradients_off_freezes():
    model, x = swin(), torch.randn(IMAGE)
    with torch.no_grad():
        frozen = attnrewrite.optimize(model, (x,), verify=False, compile=False).module
    live = attnrewrite.optimize(model, (x,), verify=False, compile=False).module
    table = next(p for n, p in model.named_parameters() if "bias_table" in n)
    with torch.no_grad():
        table.add_(1.0 + torch.randn_like(table))
        assert scaled_error(live(x), model(x)) < 1e-5
        assert scaled_error(frozen(x), model(x)) > 1e-3


@pytest.mark.parametrize("freeze", [True, False])
def test_what_was_verified_is_what_is_returned(freeze, monkeypatch):
    verified = []

    def verify(original, after, inputs, kwargs):
        verified.append(after)
        return own(original, after, inputs, kwargs)

    own = modules.verify
    monkeypatch.setattr(modules, "verify", verify)
    result = attnrewrite.optimize(swin(), (torch.randn(IMAGE),), freeze=freeze, compile=False)
    assert verified == [result.module]
    quick = sum(n.target is torch.ops.attnrewrite.linear.default for n in result.module.graph.nodes)
    assert bool(quick) == freeze


def test_training_goes_on_as_before():
    model = swin()
    twin = copy.deepcopy(model)
    x = torch.randn(IMAGE)
    rewritten = attnrewrite.optimize(twin, (x,), compile=False).module
    losses = []
    for trained in (model, rewritten):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(5):
            batch, labels = torch.randn(IMAGE), torch.randint(5, IMAGE[:1])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(trained(batch), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-2)
    for name, parameter in model.named_parameters():
        assert scaled_error(dict(rewritten.named_parameters())[name], parameter) < 1e-3, name


class CosineWindows(nn.Module):
    """Swin V2's attention in 4 x 4 windows of [B, 8, 8, 12]: scale and bias are computed from parameters, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.logit_scale = nn.Linear(12, 36), nn.Parameter(torch.randn(3, 1, 1))
        self.positions = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 3, bias=False))
        self.register_buffer("coordinates", torch.rand(16, 16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.view(-1, 2, 4, 2, 4, 12).transpose(2, 3).reshape(-1, 16, 12)
        q, k, v = self.qkv(windows).view(-1, 16, 3, 3, 4).permute(2, 0, 3, 1, 4)
        logits = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-2, -1)
        scaled = logits * torch.clamp(self.logit_scale, max=2.0).exp()
        bias = 16 * torch.sigmoid(self.positions(self.coordinates)).permute(2, 0, 1)
        merged = ((scaled + bias).softmax(-1) @ v).transpose(1, 2)
        return merged.reshape(-1, 2, 2, 4, 4, 12).transpose(2, 3).reshape(-1, 8, 8, 12)


def test_what_is_computed_from_parameters_is_computed_anew():
    torch.manual_seed(0)
    model, x = CosineWindows().eval(), torch.randn(2, 8, 8, 12)
    result = attnrewrite.optimize(model, (x,))
    assert kinds(result) == [("window", "rewrite")]
    for _ in range(2):
        assert scaled_error(result.module(x), model(x)) < 1e-5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))


def test_parameters_in_what_is_no_gather_keep_the_original():
    """Branches merged into one convolution are new weights: not while they are trained."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wide(x) + self.narrow(x)

    model, x = Branches(), torch.randn(1, 6, 5, 7)
    live = attnrewrite.optimize(model, (x,))
    assert [r.verdict for r in live.report.reparam] == ["leave"]
    assert "still being trained" in live.report.reparam[0].reason
    with torch.no_grad():
        assert [r.verdict for r in attnrewrite.optimize(model, (x,)).report.reparam] == ["rewrite"]


@pytest.mark.parametrize("target", [None, "cpu"])
def test_a_saved_directory_is_replaced(tmp_path, target):
    result = attnrewrite.optimize(nn.Linear(4, 3).eval(), (torch.randn(1, 4),), target=target, compile=False)
    for _ in range(2):
        directory = result.save(tmp_path / "out")
    report = json.loads((directory / "report.json").read_text())
    assert {*report["files"], "report.json"} == {path.name for path in directory.iterdir()}


def test_dynamic_batch_and_saving(tmp_path):
    model = UnfoldAttention(8, num_heads=2, kernel_size=3).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    result = attnrewrite.optimize(model, (torch.randn(2, 8, 7, 6),), dynamic_shapes=({0: batch},), compile=False)
    assert kinds(result) == [("neighborhood", "rewrite")]
    path = result.save(tmp_path / "out")
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "model.pt2", "report.html", "report.json"]
    loaded = torch.export.load(path / "model.pt2").module()
    for extent in (3, 8):
        x = torch.randn(extent, 8, 7, 6)
        assert scaled_error(loaded(x), model(x)) < 1e-5
    with pytest.raises((RuntimeError, AssertionError), match="8"):
        loaded(torch.randn(9, 8, 7, 6))


def test_graph_module():
    model, x = UnfoldAttention(8, num_heads=2, kernel_size=3).eval(), torch.randn(2, 8, 7, 6)
    traced = torch.fx.symbolic_trace(model)
    before = str(traced.graph)
    result = attnrewrite.optimize(traced, (x,), compile=False)
    assert kinds(result) == [("neighborhood", "rewrite")]
    assert str(traced.graph) == before
    assert scaled_error(result.module(x), model(x)) < 1e-5


def test_bad_usage(tmp_path):
    model = swin()
    with pytest.raises(UserError, match=r"torch\.export cannot trace Swin"):
        attnrewrite.optimize(model, (torch.randn(1, 5),))
    with pytest.raises(UserError, match="go with PyTorch models"):
        attnrewrite.optimize(tmp_path / "model.onnx", (torch.randn(1),))
    result = attnrewrite.optimize(nn.Linear(3, 2), (torch.randn(1, 3),))
    assert kinds(result) == []
    with pytest.raises(UserError, match="not compiled"):
        result.run({})
