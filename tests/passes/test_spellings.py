"""Every spelling becomes the same op, with the numbers of its geometry's closed form; near misses stay as they are."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from attnrewrite.frontend.onnx import read
from attnrewrite.functions import spec_of
from attnrewrite.localattention.geometry import NeighborhoodGeometry, WindowGeometry
from attnrewrite.pipeline import Outcome
from tests.models.onnx_near_misses import NEAR_MISSES, UNUSUAL
from tests.models.onnx_spellings import SPELLINGS, STRETCH, Spelling, sample_input
from tests.passes.rewritten import left_over, local_ops, optimize, ranks, written
from tests.running import error, run

# Reductions here are of 15 to 49 terms of order 1: float32 leaves about 1e-6, float16 about 3e-3 of the largest output.
TOLERANCE = {TensorProto.FLOAT: 5e-6, TensorProto.FLOAT16: 5e-3}

# Operators that may stand around an op: per-token arithmetic, layout, and the picking of channels.
AROUND = {
    "Add",
    "MatMul",
    "Mul",
    "Reshape",
    "Transpose",
    "Slice",
    "Gather",
    "Split",
    "Conv",
    "Gemm",
    "Identity",
    "Cast",
}


def assert_site(outcome: Outcome, spelling: Spelling) -> None:
    """Every field of the one site is what the spelling says."""
    expected, geometry = spelling.expected, spelling.expected.geometry
    (site,) = outcome.sites
    assert (site.kind, site.verdict) == (expected.kind, "rewrite"), site.reason
    assert (site.num_heads, site.head_dim) == (expected.num_heads, expected.head_dim)
    assert (site.bias, site.mask) == (expected.bias, expected.mask)
    (node,) = local_ops(outcome.graph)
    assert spec_of(node).geometry == geometry
    if isinstance(geometry, WindowGeometry):
        assert (site.feature_size, site.window_size, site.shift_size, site.dilation) == (
            geometry.feature_size,
            geometry.window_size,
            geometry.shift_size,
            (1,) * len(geometry.window_size),
        )
        keys = geometry.keys
        expected_keys = (None, None) if keys is None else (keys.feature_size, keys.window_size)
        assert (site.key_size, site.key_window_size) == expected_keys
        assert site.pass_name == "fuse-window-attention"
        assert (site.kernel_size, site.border) == (None, None)
    else:
        assert isinstance(geometry, NeighborhoodGeometry)
        assert (site.feature_size, site.kernel_size, site.dilation, site.border) == (
            geometry.feature_size,
            geometry.kernel_size,
            geometry.dilation,
            geometry.border,
        )
        assert site.pass_name == "unfold-to-slide-attention"
        assert (site.window_size, site.shift_size) == (None, None)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_rewritten(name: str) -> None:
    spelling = SPELLINGS[name]
    outcome = optimize(spelling.model())
    assert_site(outcome, spelling)
    assert not left_over(outcome.graph)
    assert {n.op for n in outcome.graph.nodes if not n.domain} <= AROUND
    bound = TOLERANCE[spelling.element_type]
    for batch in (1, 2, 5) if isinstance(spelling.batch, str) else (spelling.batch,):
        inputs = sample_input(spelling, int(batch))
        expected = spelling.evaluate(inputs["x"])
        for inline in (False, True):
            assert error(run(written(outcome, inline=inline), inputs)["y"], expected) <= bound


@pytest.mark.parametrize("name", STRETCH)
def test_stretch_spelling_keeps_its_numbers(name: str) -> None:
    spelling = STRETCH[name]
    outcome = optimize(spelling.model())
    inputs = sample_input(spelling)
    assert error(run(written(outcome), inputs)["y"], spelling.evaluate(inputs["x"])) <= TOLERANCE[TensorProto.FLOAT]
    assert len(local_ops(outcome.graph)) == sum(s.verdict == "rewrite" for s in outcome.sites)


@pytest.mark.parametrize("name", ["window-keys-in-another-order", "window-padded-with-a-constant"])
def test_stretch_spelling_is_rewritten(name: str) -> None:
    assert_site(optimize(STRETCH[name].model()), STRETCH[name])


@pytest.mark.parametrize("name", [n for n, s in SPELLINGS.items() if s.element_type == TensorProto.FLOAT])
def test_inlined_model_needs_opset_17_and_rank_5(name: str) -> None:
    """Where the source itself goes beyond, nothing is added to it."""
    model = SPELLINGS[name].model()
    result = written(optimize(model), inline=True)
    opset = next(i.version for i in result.opset_import if not i.domain)
    assert {n.domain for n in result.graph.node} == {""}
    assert not result.functions
    assert opset == max(13, next(i.version for i in model.opset_import))
    for node in result.graph.node:
        assert onnx.defs.get_schema(node.op_type, opset).since_version <= opset
        assert onnx.defs.has(node.op_type, max_inclusive_version=17)
    assert ranks(result) <= 5


AGAIN = "the output is rearranged once more, to other pixels than its queries came from"

# What the report says of a near miss: the beginning of the reason.
REASONS = {
    "window-rolled-back-the-wrong-way": AGAIN,
    "window-rolled-back-on-one-axis": AGAIN,
    "window-not-rolled-back": "the tokens are rearranged before the attention in a way that its output does not undo",
    "window-roll-off-by-one": AGAIN,
    "window-roll-with-a-column-twice": AGAIN,
    "window-merged-as-other-windows": AGAIN,
    "window-merged-columns-first": AGAIN,
    "window-merged-transposed": AGAIN,
    "window-merged-as-grid": AGAIN,
    "window-merged-mirrored": AGAIN,
    "window-folded-transposed": AGAIN,
    "window-folded-interleaved": AGAIN,
    "window-folded-overlapping": AGAIN,
    "window-keys-shifted-otherwise": "the keys are not those of the queries' window: window 0 reads pixel 0, its "
    "queries come from pixel 26",
    "window-values-shifted-otherwise": "token (0, 0) takes its key from pixel 26 and its value from pixel 0",
    "window-keys-and-values-shifted-otherwise": "the keys are not those of the queries' window: window 0 reads pixel "
    "26, its queries come from pixel 0",
    "window-value-tokens-rotated": "token (0, 0) takes its key from pixel 26 and its value from pixel 27",
    "window-query-tokens-rotated": AGAIN,
    "window-keys-of-the-next-window": "windows reach from one batch element into another",
    "window-one-window-reordered": "the windows of one batch element are not those of another",
    "window-heads-mixed-with-tokens": "head 1 reads other pixels than head 0",
    "window-softmax-over-queries": "the softmax does not run over the keys that are summed",
    "window-softmax-over-heads": "the softmax does not run over the keys that are summed",
    "window-softmax-over-two-axes": "the softmax does not run over the keys that are summed",
    "window-probabilities-masked": "the probabilities go into Mul, not into a sum over values",
    "window-softmax-twice": "the probabilities go into Softmax, not into a sum over values",
    "window-logits-capped": "the logits come from Tanh, not from a product of queries and keys",
    "window-logits-scaled-by-token": "the logits are scaled differently from token to token",
    "window-mask-in-other-order": "the mask differs between batch elements",
    "window-padded-by-reflection": "query token (2, 0) reads pixel (2, 8), a 4x4 window shifted by 2x2 reads padding",
    "halo-of-another-size-off-by-one": "the keys are not those of the queries' window: window 0 reads pixel 12, its "
    "queries come from pixel 0",
    "halo-values-shifted-by-one": "token (0, 10) takes its key from pixel -1 and its value from pixel 0",
    "halo-values-of-another-border": "token (0, 0) takes its key from pixel -1 and its value from pixel 0",
    "halo-stride-of-three": "the key windows are not evenly spaced",
    "halo-windows-by-columns": "16 queries attend 64 keys, which are no rectangle of pixels around the query's window",
    "halo-one-key-moved": "16 queries attend 64 keys, which are no rectangle of pixels around the query's window",
    "halo-two-borders": "the keys outside the map are something else along every axis",
    "window-logits-read-twice": "the logits are used elsewhere as well",
    "window-probabilities-read-twice": "the attention probabilities have 2 uses, so they must exist in memory",
    "neighborhood-one-tap-off": "keys: the keys are no rectangle of pixels around the query: query pixel (3, 5) reads "
    "(2, 4), (2, 5), (2, 6), (3, 4), (3, 5), (3, 6), (4, 4), (4, 5), (4, 5)",
    "neighborhood-a-tap-twice": "keys: the keys are no rectangle of pixels around the query: query pixel (3, 5) reads",
    "neighborhood-channels-exchanged": "the channels of one key are those of 4 pixels, so the keys are no pixels",
    "neighborhood-values-dilated": "query pixel 0 takes key 5 from pixel 1 and its value from pixel 2",
    "neighborhood-value-taps-transposed": "query pixel 0 takes key 5 from pixel 1 and its value from pixel 11",
    "neighborhood-value-border-replicated": "query pixel 0 takes key 0 from outside and its value from pixel 0",
    "dense-one-wrong-entry": "the keys that a constant mask leaves to a query",
    "dense-penalised": "global attention: each of the 77 queries attends the same 77 keys",
    "dense-keys-alike": "a constant mask leaves the same keys to every query",
    "dense-causal": "a 77 neighbourhood covers the whole map",
    "neighborhood-softmax-over-pixels": "the softmax does not run over the keys that are summed",
    "neighborhood-softmax-per-channel": "the values have no channel axis of their own",
    "neighborhood-softmax-over-two-axes": "the softmax does not run over the keys that are summed",
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone_and_the_reason_said(name: str) -> None:
    near_miss = NEAR_MISSES[name]
    graph = read(near_miss.model())
    before = str(graph)
    outcome = optimize(near_miss.model())
    assert str(outcome.graph) == before, near_miss.wrong
    assert not outcome.modified
    site = outcome.sites[0]
    assert site.verdict == "leave"
    assert site.reason.startswith(REASONS[name]), site.reason
    assert site.reason_node
    assert site.pass_name is None


def test_every_reason_is_of_a_near_miss() -> None:
    assert REASONS.keys() == NEAR_MISSES.keys()
    assert not any(re.search(r"\n|  ", reason) for reason in REASONS.values())


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_attention_is_rewritten_to_what_it_computes(name: str) -> None:
    model = UNUSUAL[name].model()
    inputs = sample_input(UNUSUAL[name].looks_like)
    expected = run(model, inputs)
    outcome = optimize(UNUSUAL[name].model())
    assert [s.verdict for s in outcome.sites] == ["rewrite"]
    assert error(run(written(outcome), inputs)["y"], expected["y"].astype(np.float64)) <= TOLERANCE[TensorProto.FLOAT]


def test_second_output_of_a_near_miss_is_still_there() -> None:
    near_miss = NEAR_MISSES["window-logits-read-twice"]
    model = near_miss.model()
    inputs = sample_input(near_miss.looks_like)
    found = run(written(optimize(near_miss.model())), inputs)
    for name, expected in run(model, inputs).items():
        np.testing.assert_array_equal(found[name], expected)
