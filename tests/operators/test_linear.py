"""The linear layer that is only run: oneDNN where it is faster, PyTorch's own wherever something looks on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnrewrite
from attnrewrite.operators import linear as module
from tests.test_modules import IMAGE, scaled_error, swin

X, WEIGHT, BIAS = torch.randn(2, 20, 12), torch.randn(7, 12), torch.randn(7)


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN taken for the faster one; says how often it was asked."""
    calls = []
    original = module._onednn
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "_onednn", lambda *a: calls.append(a) or original(*a))
    return calls


@pytest.mark.parametrize("bias", [BIAS, None])
def test_the_same_numbers(onednn, bias):
    found = torch.ops.attnrewrite.linear(X, WEIGHT, bias)
    assert len(onednn) == 1
    assert scaled_error(found, nn.functional.linear(X, WEIGHT, bias)) < 1e-6


PLAIN = {
    "few rows": lambda: (X[0, :3], WEIGHT, BIAS),
    "float64": lambda: (X.double(), WEIGHT.double(), BIAS.double()),
    "strided": lambda: (X.mT.contiguous().mT, WEIGHT, BIAS),
    "gradients": lambda: (X, nn.Parameter(WEIGHT), BIAS),
}


@pytest.mark.parametrize("name", PLAIN)
def test_left_to_torch(onednn, name):
    arguments = PLAIN[name]()
    found = torch.ops.attnrewrite.linear(*arguments)
    assert not onednn
    assert scaled_error(found, nn.functional.linear(*arguments)) < 1e-6
    assert found.requires_grad == (name == "gradients")


def test_left_to_torch_where_it_is_faster(onednn, monkeypatch):
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    torch.ops.attnrewrite.linear(X, WEIGHT, BIAS)
    assert not onednn


def test_under_autocast_and_vmap(onednn):
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.attnrewrite.linear(X, WEIGHT, BIAS).dtype == torch.bfloat16
    assert not onednn
    found = torch.vmap(lambda x: torch.ops.attnrewrite.linear(x, WEIGHT, BIAS))(X)
    assert scaled_error(found, nn.functional.linear(X, WEIGHT, BIAS)) < 1e-6


def test_it_is_measured():
    assert module.onednn_is_faster() in (True, False)


def test_frozen_modules_call_it_and_export_as_before(onednn):
    model, x = swin(), torch.randn(IMAGE)
    with torch.no_grad():
        frozen = attnrewrite.optimize(model, (x,), compile=False).module
        assert scaled_error(frozen(x), model(x)) < 1e-5
    assert onednn
    program = torch.export.export(frozen, (x,)).run_decompositions()
    assert not [n for n in program.graph.nodes if n.target is torch.ops.attnrewrite.linear.default]
    live = attnrewrite.optimize(model, (x,), compile=False).module
    assert not [n for n in live.graph.nodes if n.target is torch.ops.attnrewrite.linear.default]
