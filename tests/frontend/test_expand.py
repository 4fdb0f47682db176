"""Attention in one operator is written out where it is plain, and left where it does more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from attnrewrite.frontend.onnx import read, to_model
from tests.models.onnx_builder import Builder
from tests.models.onnx_fused import ORT, multi_head_packed
from tests.models.onnx_spellings import UNSHIFTED, sample_input
from tests.running import error, run

SHAPE = (2, 3, 5, 4)  # batch, heads, tokens, channels of a head


def test_packed_multi_head_attention_means_the_same() -> None:
    """ONNX Runtime runs it on GPUs alone, so it is compared with the closed form."""
    inputs = sample_input(UNSHIFTED)
    found = run(to_model(read(multi_head_packed())), inputs)["y"]
    assert error(found, UNSHIFTED.evaluate(inputs["x"])) < 5e-6


def causal(g: Builder, x: str) -> str:
    return g.op("Attention", x, x, x, is_causal=1)


def masked_and_causal(g: Builder, x: str) -> str:
    allowed = np.random.default_rng(0).random((5, 5)) < 0.7
    np.fill_diagonal(allowed, val=True)
    return g.op("Attention", x, x, x, g.constant(allowed), is_causal=1, scale=0.3)


def causal_of_tokens(g: Builder, x: str) -> str:
    tokens = g.reshape(g.transpose(x, 0, 2, 1, 3), 2, 5, 12)
    attended = g.op("MultiHeadAttention", tokens, tokens, tokens, domain=ORT, num_heads=3, unidirectional=1)
    return g.transpose(g.reshape(attended, 2, 5, 3, 4), 0, 2, 1, 3)


def other_value_size(g: Builder, x: str) -> str:
    """Packed weights whose values have more channels than queries and keys."""
    rng = np.random.default_rng(0)
    tokens = g.reshape(g.transpose(x, 0, 2, 1, 3), 2, 5, 12)
    weights, bias = g.constant(rng.normal(size=(12, 6 + 6 + 12))), g.constant(rng.normal(size=24))
    attended = g.op("Attention", tokens, weights, bias, domain=ORT, num_heads=3, qkv_hidden_sizes=[6, 6, 12])
    return g.transpose(g.reshape(attended, 2, 5, 3, 4), 0, 2, 1, 3)


def transposed_products(g: Builder, x: str) -> str:
    return g.op("FusedMatMul", g.op("FusedMatMul", x, x, domain=ORT, transA=1, alpha=0.5), x, domain=ORT, transB=1)


PLAIN = [causal, masked_and_causal, causal_of_tokens, other_value_size, transposed_products]


def _model(build: Callable[[Builder, str], str]) -> onnx.ModelProto:
    g = Builder(23)
    return g.model({"y": build(g, g.input("x", SHAPE))})


@pytest.mark.parametrize("build", PLAIN)
def test_plain_attention_is_written_out(build: Callable[[Builder, str], str]) -> None:
    model = _model(build)
    graph = read(model)
    assert all(n.domain == "" and n.op != "Attention" for n in graph.nodes)
    inputs = {"x": np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)}
    assert error(run(to_model(graph), inputs)["y"], run(model, inputs)["y"].astype(np.float64)) < 1e-6


def capped(g: Builder, x: str) -> str:
    return g.op("Attention", x, x, x, softcap=5.0)


def grouped(g: Builder, x: str) -> str:
    one = g.slice(x, 0, 1, 1)
    return g.op("Attention", x, one, one)


def logits_returned(g: Builder, x: str) -> str:
    names = g.ops("Attention", x, x, x, "", "", "", outputs=4)
    return g.op("Add", names[0], g.slice(names[3], 0, 4, 3))


def cached(g: Builder, x: str) -> str:
    past = np.zeros((2, 3, 1, 4))
    names = g.ops("Attention", x, x, x, "", g.constant(past), g.constant(past), outputs=3)
    return names[0]


def padding_masked(g: Builder, x: str) -> str:
    tokens = g.reshape(g.transpose(x, 0, 2, 1, 3), 2, 5, 12)
    lengths = g.op("Cast", g.constant(np.array([[1, 1, 1, 1, 0]] * 2)), to=onnx.TensorProto.INT32)
    attended = g.op("MultiHeadAttention", tokens, tokens, tokens, "", lengths, domain=ORT, num_heads=3)
    return g.transpose(g.reshape(attended, 2, 5, 3, 4), 0, 2, 1, 3)


@pytest.mark.parametrize("build", [capped, grouped, logits_returned, cached, padding_masked])
def test_attention_that_does_more_is_left(build: Callable[[Builder, str], str]) -> None:
    graph = read(_model(build))
    assert sum(n.op in ("Attention", "MultiHeadAttention") for n in graph.nodes) == 1
    assert not any(n.op == "Softmax" for n in graph.nodes)
