"""Attention over tokens that data choose is left, and the reason names the operator that chooses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.models.onnx_builder import Builder
from tests.passes.rewritten import optimize

TOKENS, CHANNELS, CHOSEN = 12, 5, 7


def attend(g: Builder, query: str, key: str, value: str) -> str:
    """Among the tokens of every window, [B, windows, N, C]; back on the map."""
    logits = g.op("MatMul", query, g.transpose(key, 0, 1, 3, 2))
    return g.reshape(g.op("MatMul", g.op("Softmax", logits, axis=-1), value), 2, TOKENS, CHANNELS)


def windows(g: Builder, x: str) -> str:
    return g.reshape(x, 2, 4, TOKENS // 4, CHANNELS)


def chosen(g: Builder, x: str, count: int) -> str:
    """Of every channel its largest numbers, [B, count, windows, C]."""
    tokens = g.reshape(x, 2, TOKENS // 4, 4, CHANNELS)
    indices = g.ops("TopK", tokens, g.constant([count]), outputs=2, axis=1)[1]
    return g.op("GatherElements", tokens, indices, axis=1)


def keys_by_topk(g: Builder, x: str) -> str:
    """Two tokens for every window, out of all the map."""
    few = g.transpose(chosen(g, x, 2), 0, 2, 1, 3)
    return attend(g, windows(g, x), few, few)


def values_by_topk(g: Builder, x: str) -> str:
    """As many as the keys, in an order that is no window's."""
    return attend(g, windows(g, x), windows(g, x), g.transpose(chosen(g, x, 3), 0, 2, 1, 3))


def all_by_the_same_choice(g: Builder, x: str) -> str:
    """What is chosen is the feature map of an ordinary window attention."""
    tokens = g.reshape(chosen(g, x, 3), 2, 4, 3, CHANNELS)
    return attend(g, tokens, tokens, tokens)


def logits_by_topk(g: Builder, x: str) -> str:
    logits = g.op("MatMul", x, g.transpose(x, 0, 2, 1))
    values, indices = g.ops("TopK", logits, g.constant([CHOSEN]), outputs=2, axis=2)
    low = g.constant(np.full((2, TOKENS, TOKENS), -np.inf))
    kept = g.op("ScatterElements", low, indices, values, axis=2)
    return g.op("MatMul", g.op("Softmax", kept, axis=-1), x)


def probabilities_gated(g: Builder, x: str) -> str:
    logits = g.op("MatMul", x, g.transpose(x, 0, 2, 1))
    gate = g.op("Sigmoid", g.op("ReduceMean", x, axes=[2], keepdims=1))
    return g.op("MatMul", g.op("Mul", g.op("Softmax", logits, axis=-1), gate), x)


REASONS: dict[str, tuple[Callable[[Builder, str], str], str]] = {
    "keys": (
        keys_by_topk,
        "the key tokens are chosen from data: they come from GatherElements, at indices that TopK computes",
    ),
    "values": (
        values_by_topk,
        "the value tokens are chosen from data: they come from GatherElements, at indices that TopK computes",
    ),
    "logits": (
        logits_by_topk,
        "the logits are chosen from data: they come from ScatterElements, at indices that TopK computes",
    ),
    "gate": (probabilities_gated, "the probabilities are multiplied by a tensor computed from data"),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_names_what_depends_on_data(name: str) -> None:
    write, reason = REASONS[name]
    g = Builder()
    outcome = optimize(g.model({"y": write(g, g.input("x", [2, TOKENS, CHANNELS]))}))
    (site,) = outcome.sites
    assert site.verdict == "leave"
    assert site.reason.endswith(reason)
    assert site.reason_node
    assert not outcome.modified


def test_a_choice_that_all_operands_share_is_no_reason() -> None:
    g = Builder()
    outcome = optimize(g.model({"y": all_by_the_same_choice(g, g.input("x", [2, TOKENS, CHANNELS]))}))
    (site,) = outcome.sites
    assert (site.kind, site.verdict, site.window_size) == ("stripe", "rewrite", (1, TOKENS // 4))


def test_indices_computed_from_shapes_are_no_choice() -> None:
    """Logits written over, element by element of a symbolic batch: no data chooses where."""
    g = Builder()
    x = g.input("x", ["batch", TOKENS, CHANNELS])
    logits = g.op("MatMul", x, g.transpose(x, 0, 2, 1))
    batch = g.op("Gather", g.op("Shape", x), g.constant(np.int64(0)), axis=0)
    elements = g.op("Range", g.constant(np.int64(0)), batch, g.constant(np.int64(1)))
    written = g.op("ScatterND", logits, g.unsqueeze(elements, 1), g.mul(logits, 0.5))
    (site,) = optimize(g.model({"y": g.op("MatMul", g.op("Softmax", written, axis=-1), x)})).sites
    assert site.verdict == "leave"
    assert site.reason.endswith("the logits come from ScatterND, not from a product of queries and keys")
