"""What windows compute beside their attention is merged alone; the attention becomes one op, or nothing changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx
import pytest

from attnrewrite.frontend.onnx import read
from attnrewrite.verify.exact import verify_exact
from tests.models.onnx_builder import Builder
from tests.models.onnx_moved_blocks import AROUND, CHANNELS, Around, Layers, open_model
from tests.passes.rewritten import optimize, sites, written
from tests.passes.test_move_partitions import assert_same_numbers


def mixed(g: Builder, layers: Layers, tokens: str) -> str:
    """A depthwise convolution along the tokens of each group."""
    kernel = g.constant(layers.weights(CHANNELS, 1, 3))
    convolved = g.op("Conv", g.transpose(tokens, 0, 2, 1), kernel, group=CHANNELS, pads=[1, 1])
    return g.transpose(convolved, 0, 2, 1)


def joined(around: Around, join: str = "Add", behind: Around | None = None, layers_behind: int = 1) -> onnx.ModelProto:
    """merge(linear(join(attention(tokens), mixed(tokens)))); behind: whose merge it is."""
    g, x, layers = open_model(around)
    tokens = around.before(g, x)
    out = g.op(join, layers.attention(tokens), mixed(g, layers, tokens))
    for _ in range(layers_behind):
        out = layers.linear(out, CHANNELS, CHANNELS)
    return g.model({"y": (behind or around).behind(g, out)})


@pytest.mark.parametrize("join", ["Add", "Mul"])
@pytest.mark.parametrize("spelling", AROUND)
def test_attention_joined_inside_its_windows_is_one_op(spelling: str, join: str) -> None:
    around = AROUND[spelling]
    model = joined(around, join)
    outcome = optimize(model)
    assert sites(outcome) == Counter({(around.kind, "rewrite"): 1}), [s.reason for s in outcome.sites]
    assert outcome.rewrites["move-merges"] == 1
    assert_same_numbers(model, written(outcome))
    assert [c.passed for c in verify_exact(read(model), read(written(outcome)))] == [True]


def test_sum_merged_at_once() -> None:
    model = joined(AROUND["windows"], layers_behind=0)
    outcome = optimize(model)
    assert sites(outcome) == Counter({("window", "rewrite"): 1}), [s.reason for s in outcome.sites]
    assert_same_numbers(model, written(outcome))


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("spelling", ["windows", "windows by gather", "shifted", "grid"])
def test_values_that_are_convolved_as_well_are_computed_once(spelling: str, sliced: bool) -> None:
    """One linear layer in the windows makes q, k and v; its values are moved to where the windows convolve them."""
    around = AROUND[spelling]
    g, x, layers = open_model(around)
    qkv = layers.linear(around.before(g, x), CHANNELS, 3 * CHANNELS)
    if sliced:
        q, k, v = (g.slice(qkv, part * CHANNELS, (part + 1) * CHANNELS, 2) for part in range(3))
    else:
        q, k, v = g.split(qkv, [CHANNELS] * 3, 2)
    weights = g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 2, 1)), axis=-1)
    model = g.model({"y": around.behind(g, g.op("Add", g.op("MatMul", weights, v), mixed(g, layers, v)))})
    outcome = optimize(model)
    assert sites(outcome) == Counter({(around.kind, "rewrite"): 1}), [s.reason for s in outcome.sites]
    assert [n.op for n in outcome.graph.nodes].count("MatMul") == 1
    assert_same_numbers(model, written(outcome))
    assert [c.passed for c in verify_exact(read(model), read(written(outcome)))] == [True]


def mixed_output() -> onnx.ModelProto:
    """What is joined is computed from the attention's output: that is read in window order."""
    around = AROUND["windows"]
    g, x, layers = open_model(around)
    out = layers.attention(around.before(g, x))
    return g.model({"y": around.behind(g, g.op("Add", out, mixed(g, layers, out)))})


def summary_of_each_window() -> onnx.ModelProto:
    """One token per window is added to all of them."""
    around = AROUND["windows"]
    g, x, layers = open_model(around)
    tokens = around.before(g, x)
    summary = g.op("ReduceMax", mixed(g, layers, tokens), axes=[1], keepdims=1)
    return g.model({"y": around.behind(g, g.op("Add", layers.attention(tokens), summary))})


def sum_leaves_in_windows() -> onnx.ModelProto:
    """The sum is an output of the model as it stands in its windows."""
    around = AROUND["windows"]
    g, x, layers = open_model(around)
    tokens = around.before(g, x)
    out = g.op("Add", layers.attention(tokens), mixed(g, layers, tokens))
    return g.model({"y": around.behind(g, layers.linear(out, CHANNELS, CHANNELS)), "windows": out})


NEAR_MISSES: dict[str, Callable[[], onnx.ModelProto]] = {
    "merged as a grid": lambda: joined(AROUND["windows"], behind=AROUND["grid"]),
    "merged without the shift back": lambda: joined(AROUND["shifted"], behind=AROUND["windows"]),
    "what is joined is made of the output": mixed_output,
    "one token per window is joined": summary_of_each_window,
    "the sum is an output": sum_leaves_in_windows,
}


NOT_UNDONE = "the tokens are rearranged before the attention in a way that its output does not undo"


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_merge_that_cannot_be_moved_stays(name: str) -> None:
    model = NEAR_MISSES[name]()
    outcome = optimize(model)
    assert outcome.rewrites["move-merges"] == 0
    (site,) = outcome.sites
    if name == "what is joined is made of the output":
        assert (site.verdict, site.reason) == ("leave", NOT_UNDONE)
    else:  # the attention as it stands: on rows of tokens, the partition outside
        assert (site.verdict, site.feature_size, site.window_size) == ("rewrite", (8 * 12,), (12,)), site.reason
    assert_same_numbers(model, written(outcome))
