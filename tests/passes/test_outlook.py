"""Sums of neighbours with predicted weights: every spelling becomes one op, near misses stay as they are."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from attnrewrite.frontend.onnx import to_model
from attnrewrite.functions import spec_of
from attnrewrite.functions.spec import SlideAttention
from attnrewrite.pipeline import Outcome
from tests.models import onnx_outlook
from tests.models.onnx_builder import Builder
from tests.models.onnx_outlook import AGGREGATIONS, K3, NEAR_MISSES, OUTLOOKS, Aggregation, Outlook, by_slices
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS
from tests.passes.rewritten import local_ops, optimize, ranks
from tests.running import error, run

TOLERANCE = 5e-6  # sums of up to 225 products of order 1 in float32
# What may be left of a model: the predictions, the projections, layout and per-token arithmetic.
AROUND = {"Conv", "MatMul", "Add", "Mul", "Transpose", "Reshape", "AveragePool", "Identity", "Gather"}

MODELS: dict[str, Aggregation | Outlook] = {**AGGREGATIONS, **OUTLOOKS}


def spec_in(outcome: Outcome) -> SlideAttention:
    (node,) = local_ops(outcome.graph)
    spec = spec_of(node)
    assert isinstance(spec, SlideAttention)
    return spec


def assert_same_numbers(model: onnx.ModelProto, outcome: Outcome, batches: tuple[int, ...] = (1, 2, 3)) -> None:
    declared = [d.dim_value or None for d in model.graph.input[0].type.tensor_type.shape.dim]
    for batch in batches if declared[0] is None else (declared[0],):
        x = np.random.default_rng(batch).normal(size=(batch, *declared[1:])).astype(np.float32)
        expected = run(model, {"x": x})
        for inline in (False, True):
            found = run(to_model(outcome.graph, inline=inline), {"x": x})
            for name, numbers in expected.items():
                assert error(found[name], numbers) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_spelling_is_rewritten(name: str) -> None:
    case = MODELS[name]
    model = case.model()
    outcome = optimize(model)
    (site,) = outcome.sites
    assert (site.kind, site.verdict, site.pass_name) == ("outlook", "rewrite", "fuse-outlook-attention"), site.reason
    assert (site.num_heads, site.head_dim, site.border) == (HEADS, HEAD_DIM, "zero")
    assert (site.kernel_size, site.dilation) == (case.geometry.kernel_size, case.geometry.dilation)
    assert site.feature_size == case.geometry.key_size
    spec = spec_in(outcome)
    assert (spec.geometry, spec.num_heads) == (case.geometry, HEADS)
    assert spec.predicted == ("logits" if case.softmax else "weights")
    assert (spec.overlap_add, spec.upsampling) == (isinstance(case, Outlook), ())
    assert {n.op for n in outcome.graph.nodes if not n.domain} <= AROUND
    assert not [n for n in outcome.graph.nodes if any((o.rank or 0) > 5 for o in n.outputs)]
    assert_same_numbers(model, outcome)
    assert ranks(to_model(outcome.graph, inline=True)) <= 5


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left(name: str) -> None:
    case, reason = NEAR_MISSES[name]
    outcome = optimize(case.model())
    assert not local_ops(outcome.graph)
    (site,) = outcome.sites
    assert site.verdict == "leave" and re.search(reason, site.reason), site.reason


def test_weights_moved_by_a_pixel_stay_those_of_that_pixel() -> None:
    """A map of weights may be moved before it is used: the op reads it where it lies then."""
    model = Aggregation(weights_of=onnx_outlook.of_the_next_pixel, softmax=False).model()
    outcome = optimize(model)
    assert spec_in(outcome).geometry == K3
    assert_same_numbers(model, outcome)


def upsampled(factor: int, *, softmax: bool = True, swapped: bool = False) -> onnx.ModelProto:
    """Convex upsampling: K weights for each of factor x factor pixels, of the neighbours of one coarse pixel."""
    rng, g = np.random.default_rng(0), Builder()
    height, width = K3.feature_size
    x = g.input("x", ["batch", CHANNELS, height, width])
    values = g.op("Conv", x, g.constant(rng.normal(size=(2, CHANNELS, 1, 1))))
    weights = g.op("Conv", x, g.constant(rng.normal(size=(9 * factor * factor, CHANNELS, 1, 1))))
    weights = g.reshape(weights, -1, 1, 9, factor, factor, height, width)
    if softmax:
        weights = g.op("Softmax", weights, axis=2)
    padded = g.pad(values, [0, 0, 1, 1], [0, 0, 1, 1])
    neighbours = g.concat(
        [
            g.unsqueeze(g.slice(g.slice(padded, i, i + height, 2), j, j + width, 3), 2)
            for i in range(3)
            for j in range(3)
        ],
        2,
    )
    y = g.reduce_sum(g.op("Mul", weights, g.reshape(neighbours, -1, 2, 9, 1, 1, height, width)), 2)
    y = g.transpose(y, *((0, 1, 4, 3, 5, 2) if swapped else (0, 1, 4, 2, 5, 3)))
    return g.model({"y": g.reshape(y, -1, 2, factor * height, factor * width)})


@pytest.mark.parametrize("softmax", [True, False])
def test_upsampling_with_predicted_weights_is_rewritten(softmax: bool) -> None:
    model = upsampled(4, softmax=softmax)
    outcome = optimize(model)
    (site,) = outcome.sites
    assert (site.kind, site.verdict, site.kernel_size) == ("outlook", "rewrite", (3, 3)), site.reason
    spec = spec_in(outcome)
    assert (spec.geometry, spec.upsampling, spec.overlap_add) == (K3, (4, 4), False)
    assert {n.op for n in outcome.graph.nodes} <= {"Conv", "SlideAttention", "Reshape", "Identity"}
    assert_same_numbers(model, outcome)


def test_upsampled_pixels_put_down_the_other_way_are_left() -> None:
    outcome = optimize(upsampled(4, swapped=True))
    assert not local_ops(outcome.graph)
    (site,) = outcome.sites
    assert "16 sums per pixel do not return as a block of pixels each" in site.reason


def test_depthwise_convolution_written_as_sum_is_no_site() -> None:
    """Neighbours weighted by constants are a convolution: nothing is predicted."""
    g = Builder()
    x = g.input("x", ["batch", CHANNELS, *K3.feature_size])
    weights = np.random.default_rng(0).normal(size=(1, CHANNELS, 9, 1, 1))
    outcome = optimize(g.model({"y": g.reduce_sum(g.mul(by_slices(g, x, K3), weights), 2)}))
    assert not outcome.sites and not local_ops(outcome.graph)


def test_weights_of_fixed_pixels_are_no_site() -> None:
    """A window's products summed over the window (linear attention) move with no pixel of the weights."""
    g = Builder()
    x = g.input("x", ["batch", 8, 8, 4])
    windows = g.reshape(g.transpose(g.reshape(x, -1, 2, 4, 2, 4, 4), 0, 1, 3, 2, 4, 5), -1, 16, 4)
    y = g.op("MatMul", g.transpose(windows, 0, 2, 1), g.op("Relu", windows))
    outcome = optimize(g.model({"y": y}))
    assert not outcome.sites and not local_ops(outcome.graph)


def test_attention_whose_logits_are_replaced_is_told_so() -> None:
    """Logits that compare queries and keys are nothing predicted: the reason is that of the attention."""
    rng, g = np.random.default_rng(0), Builder()
    x = g.input("x", [2, CHANNELS, 16, 24])
    blocks = g.gather(x, np.arange(16).reshape(4, 4), 2)
    blocks = g.gather(blocks, np.arange(24).reshape(6, 4), 4)  # [B, C, windows, window, windows, window]
    tokens = g.reshape(g.transpose(blocks, 0, 2, 4, 3, 5, 1), -1, 16, CHANNELS)
    query, key, value = (g.linear(tokens, rng.normal(size=(CHANNELS, CHANNELS)), np.zeros(CHANNELS)) for _ in range(3))
    logits = g.op("MatMul", query, g.transpose(key, 0, 2, 1))
    low = g.op("Less", logits, g.op("ReduceMean", logits, axes=[-1]))
    weights = g.op("Softmax", g.op("Where", low, g.constant(np.float64(-1e9)), logits), axis=-1)
    attended = g.reshape(g.op("MatMul", weights, value), 2, 4, 6, 4, 4, CHANNELS)
    back = g.reshape(g.transpose(attended, 0, 5, 1, 3, 2, 4), 2, CHANNELS, 16, 24)
    (site,) = optimize(g.model({"y": g.op("Conv", back, g.constant(rng.normal(size=(8, CHANNELS, 1, 1))))})).sites
    assert (site.verdict, site.kind) == ("leave", "other")
    assert site.reason.startswith("masked logits are set to -1e+09")


def test_logits_of_a_neighbourhood_are_no_site() -> None:
    """Products of queries with keys that have a constant per slot, summed over the channels of each head."""
    rng, g = np.random.default_rng(0), Builder()
    query = g.op("Conv", g.input("query", [1, 6, 5, 7]), g.constant(rng.normal(size=(6, 6, 1, 1))))
    keys = g.add(g.input("keys", [1, 6, 5, 7, 9]), rng.normal(size=9))
    products = g.op("Mul", g.reshape(query, 1, 2, 3, 5, 7, 1), g.reshape(keys, 1, 2, 3, 5, 7, 9))
    outcome = optimize(g.model({"logits": g.reduce_sum(products, 2, keepdims=True)}))
    assert not outcome.sites and not local_ops(outcome.graph)
