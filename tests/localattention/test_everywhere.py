"""Attention that cannot be read to its end is told to be global where its logits show it, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models.onnx_builder import Builder
from tests.passes.rewritten import optimize

TOKENS, DIM = 12, 8
GLOBAL = "global attention: each of the 12 queries attends the same 12 keys; "


def products(g: Builder, x: str) -> tuple[str, str]:
    """Logits [B, 12, 12] and values [B, 12, 8] of the tokens x."""
    rng = np.random.default_rng(0)
    query, key, value = (g.op("MatMul", x, g.constant(rng.normal(size=(DIM, DIM)))) for _ in range(3))
    return g.op("MatMul", query, g.transpose(key, 0, 2, 1)), value


def tokens(g: Builder) -> str:
    return g.input("x", ["batch", TOKENS, DIM])


def probabilities_twice(g: Builder) -> str:
    logits, value = products(g, tokens(g))
    weights = g.op("Softmax", logits, axis=-1)
    return g.op("Add", g.op("MatMul", weights, value), g.op("MatMul", g.op("Sqrt", weights), value))


def probabilities_in_two_sums(g: Builder) -> str:
    logits, value = products(g, tokens(g))
    weights = g.op("Softmax", logits, axis=-1)
    return g.op("MatMul", weights, g.op("Add", value, g.op("MatMul", weights, value)))


def over_the_queries(g: Builder) -> str:
    logits, value = products(g, tokens(g))
    return g.op("MatMul", g.op("Softmax", logits, axis=1), value)


def logits_twice(g: Builder) -> str:
    logits, value = products(g, tokens(g))
    return g.op("Add", g.op("MatMul", g.op("Softmax", logits, axis=-1), value), g.op("MatMul", logits, value))


def probabilities_mixed(g: Builder) -> str:
    logits, value = products(g, tokens(g))
    mixed = g.op("Mul", g.op("Softmax", logits, axis=-1), g.op("Sigmoid", g.op("MatMul", value, _square(g))))
    return g.op("MatMul", mixed, value)


def _square(g: Builder) -> str:
    return g.constant(np.random.default_rng(1).normal(size=(DIM, TOKENS)))


def windows_twice(g: Builder) -> str:
    """The same twelve tokens out of 36: rows of the batch that may be windows."""
    x = g.input("x", ["batch", 3, TOKENS, DIM])
    logits, value = products(g, g.reshape(x, -1, TOKENS, DIM))
    weights = g.op("Softmax", logits, axis=-1)
    return g.op("Add", g.op("MatMul", weights, value), g.op("MatMul", g.op("Sqrt", weights), value))


def fixed_weights(g: Builder) -> str:
    x = tokens(g)
    shape = g.concat([g.op("Slice", g.op("Shape", x), g.constant([0]), g.constant([1])), g.constant([12, 12])], 0)
    logits = g.op("Expand", g.constant(np.random.default_rng(1).normal(size=(1, 12, 12))), shape)
    weights = g.op("Softmax", logits, axis=-1)
    return g.op("MatMul", g.op("Mul", weights, g.constant(np.ones((12, 12)) / 2)), x)


CASES = {
    "probabilities-twice": (probabilities_twice, "global", GLOBAL + "the attention probabilities have 2 uses"),
    "probabilities-in-two-sums": (probabilities_in_two_sums, "other", "the attention probabilities have 2 uses"),
    "over-the-queries": (over_the_queries, "other", "the softmax does not run over the keys that are summed"),
    "logits-twice": (logits_twice, "global", GLOBAL + "the logits are used elsewhere as well"),
    "probabilities-mixed": (probabilities_mixed, "global", GLOBAL + "the probabilities are multiplied by a tensor"),
    "windows-twice": (windows_twice, "other", "the attention probabilities have 2 uses"),
    "fixed-weights": (fixed_weights, "other", "the logits are the same for every input; "),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said(case: str) -> None:
    build, kind, reason = CASES[case]
    g = Builder(17)
    outcome = optimize(g.model({"y": build(g)}))
    (site,) = outcome.sites
    assert (site.kind, site.verdict) == (kind, "leave")
    assert site.reason.startswith(reason), site.reason
    assert site.reason_node
    assert not outcome.modified


@pytest.mark.parametrize("batch", [1, "batch"])
def test_pieces_of_stacked_tensors_have_no_batch_of_one(batch: int | str) -> None:
    """q, k and v of a clip's frames as exporters unbind them: the axis that they were stacked along has extent 1."""
    rng, g = np.random.default_rng(0), Builder()
    images = g.reshape(g.input("x", [batch, 4, 3, 8, 12]), -1, 3, 8, 12)
    patches = g.op("Conv", images, g.constant(rng.normal(size=(12, 3, 2, 2))), strides=[2, 2])
    frames = g.transpose(g.reshape(patches, -1, 12, 24), 0, 2, 1)
    qkv = g.linear(frames, rng.normal(size=(12, 36)), rng.normal(size=36))
    stacked = g.transpose(g.reshape(qkv, -1, 24, 3, 3, 4), 2, 0, 3, 1, 4)
    query, key, value = (g.squeeze(piece, 0) for piece in g.split(stacked, [1, 1, 1], 0))
    weights = g.op("Softmax", g.op("MatMul", query, g.transpose(key, 0, 1, 3, 2)), axis=-1)
    out = g.reshape(g.transpose(g.op("MatMul", weights, value), 0, 2, 1, 3), -1, 24, 12)
    (site,) = optimize(g.model({"y": out})).sites
    assert (site.verdict, site.kind) == ("leave", "global"), site.reason
