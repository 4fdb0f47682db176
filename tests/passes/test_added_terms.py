"""What is added to the logits besides constants: products of the query with constants, tensors computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest

from attnrewrite.functions import operands_of, spec_of
from attnrewrite.functions.spec import FlashWindowAttention
from tests.models.onnx_builder import Builder
from tests.models.onnx_spellings import UNSHIFTED, WINDOW
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, WindowSpelling
from tests.passes.rewritten import left_over, local_ops, optimize, ranks, written
from tests.running import error, run

TOLERANCE = 5e-6  # as in test_spellings
SIDE, TOKENS, WINDOWS = 4, 16, 6
RNG = np.random.default_rng(11)
TABLES = RNG.normal(size=(2, SIDE, SIDE, HEAD_DIM))  # R[axis, i, j, channel]
BY_DISTANCE = RNG.normal(size=(2, 2 * SIDE - 1, HEAD_DIM))  # [axis, i - j + SIDE - 1, channel]
FULL = RNG.normal(size=(TOKENS, TOKENS, HEAD_DIM))
PER_HEAD = RNG.normal(size=(HEADS, SIDE, SIDE, HEAD_DIM))

OnQuery = Callable[[Builder, str, str, str], str]


@dataclass(frozen=True)
class WithTerm(WindowSpelling):
    """A window spelling whose logits [G, nH, N, N] get a term by `term(g, logits, q, k)`, q and k [G, nH, N, d]."""

    term: OnQuery | None = None
    extra: tuple[tuple[str, tuple[int | str, ...]], ...] = ()

    def attend(self, g: Builder, q: str, k: str, v: str) -> str:
        logits = self.logits(g, q, k, self.scale)
        assert self.term is not None
        logits = self.term(g, logits, q, k)
        for step in (self.bias, self.mask):
            logits = logits if step is None else step(g, logits, self)
        attended = self.weighting(g, self.softmax(g, logits, self), v)
        return g.reshape(g.transpose(attended, 0, 2, 1, 3), -1, TOKENS, CHANNELS)

    def model(self) -> onnx.ModelProto:
        g = Builder(self.opset, self.element_type)
        x = g.input("x", self.shape(self.batch))
        for name, shape in self.extra:
            g.input(name, shape)
        return g.model({"y": self.block(g, x)})


def spelled(term: OnQuery, of: WindowSpelling = WINDOW, **changes: Any) -> WithTerm:
    fields = {k: getattr(of, k) for k in of.__dataclass_fields__}
    return WithTerm(**{**fields, **changes}, term=term)


# Decomposed relative position: q[n] . R_0[n_0, m_0] + q[n] . R_1[n_1, m_1].


def by_einsum(g: Builder, logits: str, q: str, k: str) -> str:
    """segment-anything: r_q [G*nH, h, w, d], two Einsums, added to the logits seen as [G*nH, h, w, h, w]."""
    r_q = g.reshape(q, -1, SIDE, SIDE, HEAD_DIM)
    rows = g.op("Einsum", r_q, g.constant(TABLES[0]), equation="bhwc,hkc->bhwk")
    columns = g.op("Einsum", r_q, g.constant(TABLES[1]), equation="bhwc,wkc->bhwk")
    view = g.reshape(logits, -1, SIDE, SIDE, SIDE, SIDE)
    view = g.op("Add", g.op("Add", view, g.unsqueeze(rows, 4)), g.unsqueeze(columns, 3))
    return g.reshape(view, -1, HEADS, TOKENS, TOKENS)


def as_attention_mask(g: Builder, logits: str, q: str, k: str) -> str:
    """timm: rows and columns added first, then to the logits."""
    r_q = g.reshape(q, -1, SIDE, SIDE, HEAD_DIM)
    rows = g.op("Einsum", r_q, g.constant(TABLES[0]), equation="bhwc,hkc->bhwk")
    columns = g.op("Einsum", r_q, g.constant(TABLES[1]), equation="bhwc,wkc->bhwk")
    bias = g.op("Add", g.unsqueeze(rows, 4), g.unsqueeze(columns, 3))
    return g.op("Add", logits, g.reshape(bias, -1, HEADS, TOKENS, TOKENS))


def by_matmul(g: Builder, logits: str, q: str, k: str) -> str:
    """Rows of one height together: [G, nH, h, w, d] @ [h, d, h]."""
    five = g.reshape(q, -1, HEADS, SIDE, SIDE, HEAD_DIM)
    rows = g.op("MatMul", five, g.constant(TABLES[0].transpose(0, 2, 1)))
    turned = g.op("MatMul", g.transpose(five, 0, 1, 3, 2, 4), g.constant(TABLES[1].transpose(0, 2, 1)))
    columns = g.transpose(turned, 0, 1, 3, 2, 4)
    view = g.reshape(logits, -1, HEADS, SIDE, SIDE, SIDE * SIDE)
    both = g.reshape(g.op("Add", g.unsqueeze(rows, 5), g.unsqueeze(columns, 4)), -1, HEADS, SIDE, SIDE, SIDE * SIDE)
    return g.reshape(g.op("Add", both, view), -1, HEADS, TOKENS, TOKENS)


def by_sum(g: Builder, logits: str, q: str, k: str) -> str:
    """(q * R).sum(-1), the table of both axes at once."""
    full = TABLES[0][:, None, :, None] + TABLES[1][None, :, None, :]
    product = g.mul(g.unsqueeze(q, 3), full.reshape(TOKENS, TOKENS, HEAD_DIM))
    return g.op("Add", logits, g.reduce_sum(product, 4))


def skewed(g: Builder, five: str, table: np.ndarray) -> str:
    """[.., l, d] x [2l-1, d] -> [.., l, l] by distance: pad, reshape, slice (rel_to_abs)."""
    relative = g.op("MatMul", g.reshape(five, -1, SIDE, HEAD_DIM), g.constant(table.T))  # [.., l, 2l-1]
    padded = g.pad(relative, [0, 0, 0], [0, 0, 1])
    flat = g.reshape(padded, -1, SIDE * 2 * SIDE)
    flat = g.reshape(g.pad(flat, [0, 0], [0, SIDE - 1]), -1, SIDE + 1, 2 * SIDE - 1)
    return g.slice(g.slice(flat, 0, SIDE, 1), SIDE - 1, 2 * SIDE - 1, 2)


def by_skew(g: Builder, logits: str, q: str, k: str) -> str:
    """BoTNet and HaloNet: logits by distance, brought to places by pad and reshape."""
    five = g.reshape(q, -1, HEADS, SIDE, SIDE, HEAD_DIM)
    columns = g.reshape(skewed(g, five, BY_DISTANCE[1]), -1, HEADS, SIDE, SIDE, 1, SIDE)
    rows = g.reshape(skewed(g, g.transpose(five, 0, 1, 3, 2, 4), BY_DISTANCE[0]), -1, HEADS, SIDE, SIDE, SIDE, 1)
    rows = g.transpose(rows, 0, 1, 3, 2, 4, 5)
    both = g.reshape(g.op("Add", rows, columns), -1, HEADS, TOKENS, TOKENS)
    return g.op("Add", both, logits)


def per_head(g: Builder, logits: str, q: str, k: str) -> str:
    """A table of rows for every head."""
    five = g.reshape(q, -1, HEADS, SIDE, SIDE, HEAD_DIM)
    rows = g.op("Einsum", five, g.constant(PER_HEAD), equation="bnhwc,nhkc->bnhwk")
    view = g.reshape(logits, -1, HEADS, SIDE, SIDE, SIDE * SIDE)
    wide = g.reshape(g.op("Expand", g.unsqueeze(rows, 5), g.constant([1, 1, 1, 1, 1, SIDE])), -1, HEADS, SIDE, SIDE, 16)
    return g.reshape(g.op("Add", view, wide), -1, HEADS, TOKENS, TOKENS)


def full_table(g: Builder, logits: str, q: str, k: str) -> str:
    """One vector for every pair of tokens: no sum of rows and columns."""
    return g.op("Add", logits, g.op("Einsum", q, g.constant(FULL), equation="bhid,ijd->bhij"))


def halves(g: Builder, logits: str, q: str, k: str) -> str:
    """The first channels for the rows, the rest for the columns."""
    five = g.reshape(q, -1, HEADS, SIDE, SIDE, HEAD_DIM)
    first, rest = g.split(five, [2, HEAD_DIM - 2], 4)
    rows = g.op("Einsum", first, g.constant(TABLES[0][..., :2]), equation="bnhwc,hkc->bnhwk")
    columns = g.op("Einsum", rest, g.constant(TABLES[1][..., 2:]), equation="bnhwc,wkc->bnhwk")
    both = g.op("Add", g.unsqueeze(rows, 5), g.unsqueeze(columns, 4))
    return g.op("Add", logits, g.reshape(both, -1, HEADS, TOKENS, TOKENS))


def then_scaled(g: Builder, logits: str, q: str, k: str) -> str:
    """Added before the scale: 3 * (q . k + q . R)."""
    return g.mul(by_sum(g, logits, q, k), 3.0)


def subtracted(g: Builder, logits: str, q: str, k: str) -> str:
    full = TABLES[0][:, None, :, None] + TABLES[1][None, :, None, :]
    product = g.mul(g.unsqueeze(q, 3), full.reshape(TOKENS, TOKENS, HEAD_DIM))
    return g.op("Sub", logits, g.reduce_sum(product, 4))


def temperature_per_head(g: Builder, logits: str, q: str, k: str) -> str:
    """The logits are scaled head by head, the term is not."""
    return as_attention_mask(g, g.mul(logits, np.array([0.5, 2.0, 3.0])[:, None, None]), q, k)


def no_term(g: Builder, logits: str, q: str, k: str) -> str:
    return logits


RELATIVE: dict[str, tuple[WithTerm, int, float]] = {
    # the spelling, the rows of the table (2 * 4 * 4 where it is decomposed), and relative_scale
    "einsum": (spelled(by_einsum), 32, 1.0),
    "einsum-unshifted": (spelled(by_einsum, UNSHIFTED), 32, 1.0),
    "einsum-dynamic-batch": (spelled(by_einsum, batch="batch"), 32, 1.0),
    "einsum-without-bias": (spelled(by_einsum, bias=None, mask=None, geometry=UNSHIFTED.geometry), 32, 1.0),
    "attention-mask": (spelled(as_attention_mask), 32, 1.0),
    "matmul": (spelled(by_matmul), 32, 1.0),
    "mul-sum": (spelled(by_sum), 32, 1.0),
    "skew": (spelled(by_skew), 32, 1.0),
    "per-head": (spelled(per_head), 32, 1.0),
    "full-table": (spelled(full_table), 256, 1.0),
    "halves": (spelled(halves), 32, 1.0),
    "scaled": (spelled(then_scaled), 32, 3.0),
    "subtracted": (spelled(subtracted), 32, 1.0),
    "temperature-per-head": (spelled(temperature_per_head), 32, 1.0),
}


def inputs_of(spelling: WithTerm, batch: int = 2, seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"x": spelling.shape(batch), **dict(spelling.extra)}
    return {
        n: rng.normal(size=[batch if isinstance(e, str) else e for e in s]).astype(np.float32)
        for n, s in shapes.items()
    }


@pytest.mark.parametrize("case", RELATIVE)
def test_product_of_the_query_with_a_constant_is_an_operand(case: str) -> None:
    spelling, rows, scale = RELATIVE[case]
    outcome = optimize(spelling.model())
    (site,) = outcome.sites
    assert (site.verdict, site.bias) == ("rewrite", "tensor"), site.reason
    assert not left_over(outcome.graph)
    (node,) = local_ops(outcome.graph)
    spec = spec_of(node)
    assert isinstance(spec, FlashWindowAttention)
    assert spec.relative_scale == scale
    assert operands_of(node)["relative_position"].shape == (HEADS if case in PER_HEAD_TABLES else 1, rows, HEAD_DIM)
    for batch in (1, 3) if isinstance(spelling.batch, str) else (2,):
        inputs = inputs_of(spelling, batch)
        expected = run(spelling.model(), inputs)["y"].astype(np.float64)
        for inline in (False, True):
            model = written(outcome, inline=inline)
            assert error(run(model, inputs)["y"], expected) <= TOLERANCE
    assert ranks(written(optimize(replace(spelling, batch=2).model()), inline=True)) <= 6  # the spelling's own, at most


PER_HEAD_TABLES = {"per-head", "temperature-per-head"}


# Tensors computed elsewhere.


def mask_input(name: str, *shape: int | str) -> tuple[tuple[str, tuple[int | str, ...]], ...]:
    return ((name, shape),)


def added(view: tuple[int, ...] | None = None) -> OnQuery:
    """The model's second input, added to the logits (seen as [B, nW, nH, N, N], or as `view`)."""

    def write(g: Builder, logits: str, q: str, k: str) -> str:
        shape = (-1, WINDOWS, HEADS, TOKENS, TOKENS) if view is None else view
        return g.reshape(g.op("Add", g.reshape(logits, *shape), "m"), -1, HEADS, TOKENS, TOKENS)

    return write


def masked_where_negative(g: Builder, logits: str, q: str, k: str) -> str:
    five = g.reshape(logits, -1, WINDOWS, HEADS, TOKENS, TOKENS)
    chosen = g.op("Where", g.op("Less", "m", g.constant(np.float64(-0.7))), g.constant(-np.inf), five)
    return g.reshape(chosen, -1, HEADS, TOKENS, TOKENS)


def kept_where_positive(g: Builder, logits: str, q: str, k: str) -> str:
    """where(m > -0.7, logits, lowest)."""
    five = g.reshape(logits, -1, WINDOWS, HEADS, TOKENS, TOKENS)
    lowest = g.constant(np.float64(np.finfo(np.float32).min))
    chosen = g.op("Where", g.op("Greater", "m", g.constant(np.float64(-0.7))), five, lowest)
    return g.reshape(chosen, -1, HEADS, TOKENS, TOKENS)


def pixels_compared(g: Builder, logits: str, q: str, k: str) -> str:
    """A label per pixel of the image, cut into windows: tokens of other labels get -100."""
    labels = g.reshape(g.transpose(g.reshape("m", -1, 2, 4, 3, 4), 0, 1, 3, 2, 4), -1, TOKENS)
    differs = g.op("Sub", g.unsqueeze(labels, 2), g.unsqueeze(labels, 1))
    penalty = g.mul(g.op("Cast", g.op("Cast", differs, to=onnx.TensorProto.BOOL), to=g.element_type), -100.0)
    return g.op("Add", logits, g.unsqueeze(penalty, 1))


def twice(g: Builder, logits: str, q: str, k: str) -> str:
    five = g.reshape(logits, -1, WINDOWS, HEADS, TOKENS, TOKENS)
    five = g.op("Sub", g.op("Add", five, "m"), g.mul("n", 0.25))
    return g.reshape(five, -1, HEADS, TOKENS, TOKENS)


def folded_heads(g: Builder, logits: str, q: str, k: str) -> str:
    """nn.MultiheadAttention's layout: [B*nW*nH, N, N]."""
    folded = g.op("Add", g.reshape(logits, -1, TOKENS, TOKENS), "m")
    return g.reshape(folded, -1, HEADS, TOKENS, TOKENS)


def transposed_mask(g: Builder, logits: str, q: str, k: str) -> str:
    five = g.reshape(logits, -1, WINDOWS, HEADS, TOKENS, TOKENS)
    five = g.op("Add", five, g.transpose("m", 0, 1, 2, 4, 3))
    return g.reshape(five, -1, HEADS, TOKENS, TOKENS)


WHOLE = (2, WINDOWS, 1, TOKENS, TOKENS)
COMPUTED: dict[str, tuple[WithTerm, str, str, tuple[int | str, ...]]] = {
    # the spelling, bias and mask of the report, and the shape of the operand
    "mask": (spelled(added(), extra=mask_input("m", *WHOLE)), "constant", "tensor", WHOLE),
    "mask-of-all-images": (
        spelled(added(), extra=mask_input("m", WINDOWS, 1, TOKENS, TOKENS)), "constant", "tensor", (1, *WHOLE[1:]),
    ),
    "mask-of-keys": (
        spelled(added(), extra=mask_input("m", 1, 1, 1, 1, TOKENS)), "constant", "tensor", (1, 1, 1, 1, 16),
    ),
    "bias": (
        spelled(added(), extra=mask_input("m", HEADS, TOKENS, TOKENS), bias=None), "tensor", "shift", (1, 1, 3, 16, 16),
    ),
    "bias-of-windows": (
        spelled(added((-1, HEADS, TOKENS, TOKENS)), extra=mask_input("m", 2 * WINDOWS, HEADS, TOKENS, TOKENS)),
        "tensor", "shift", (2, WINDOWS, HEADS, TOKENS, TOKENS),
    ),
    "folded-heads": (
        spelled(folded_heads, extra=mask_input("m", 2 * WINDOWS * HEADS, TOKENS, TOKENS)),
        "tensor", "shift", (2, WINDOWS, HEADS, TOKENS, TOKENS),
    ),
    "transposed": (spelled(transposed_mask, extra=mask_input("m", *WHOLE)), "constant", "tensor", WHOLE),
    "dynamic-batch": (
        spelled(added(), extra=mask_input("m", "batch", *WHOLE[1:]), batch="batch"),
        "constant", "tensor", ("batch", *WHOLE[1:]),
    ),
    "dynamic-batch-folded": (
        spelled(pixels_compared, UNSHIFTED, extra=mask_input("m", "batch", 8, 12), batch="batch"),
        "constant", "tensor", ("batch", *WHOLE[1:]),
    ),
    "condition": (spelled(masked_where_negative, extra=mask_input("m", *WHOLE)), "constant", "tensor", WHOLE),
    "condition-kept": (
        spelled(kept_where_positive, extra=mask_input("m", *WHOLE), mask=None, geometry=UNSHIFTED.geometry),
        "constant", "tensor", WHOLE,
    ),
    "pixels-compared": (
        spelled(pixels_compared, extra=mask_input("m", 2, 8, 12), geometry=UNSHIFTED.geometry, mask=None),
        "constant", "tensor", WHOLE,
    ),
    "twice": (
        spelled(twice, extra=(("m", WHOLE), ("n", (HEADS, 1, TOKENS)))),
        "tensor", "tensor", (2, WINDOWS, HEADS, TOKENS, TOKENS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPUTED)
def test_computed_tensor_in_window_layout_is_an_operand(case: str) -> None:
    spelling, bias, mask, shape = COMPUTED[case]
    outcome = optimize(spelling.model())
    (site,) = outcome.sites
    assert (site.verdict, site.bias, site.mask) == ("rewrite", bias, mask), site.reason
    (node,) = local_ops(outcome.graph)
    assert tuple(map(str, operands_of(node)["logit_bias"].known_shape)) == tuple(map(str, shape))
    for batch in (1, 3) if isinstance(spelling.batch, str) else (2,):
        inputs = inputs_of(spelling, batch)
        expected = run(spelling.model(), inputs)["y"].astype(np.float64)
        for inline in (False, True):
            assert error(run(written(outcome, inline=inline), inputs)["y"], expected) <= TOLERANCE


# What must be left alone.


def of_the_key(g: Builder, logits: str, q: str, k: str) -> str:
    return by_einsum(g, logits, k, q)


def of_the_next_token(g: Builder, logits: str, q: str, k: str) -> str:
    turned = g.concat([g.slice(q, 1, TOKENS, 2), g.slice(q, 0, 1, 2)], 2)
    return as_attention_mask(g, logits, turned, k)


def of_the_next_head(g: Builder, logits: str, q: str, k: str) -> str:
    turned = g.concat([g.slice(q, 1, HEADS, 1), g.slice(q, 0, 1, 1)], 1)
    return as_attention_mask(g, logits, turned, k)


def of_channels_turned(g: Builder, logits: str, q: str, k: str) -> str:
    """The channels exchanged: a table of its own, still exact."""
    turned = g.concat([g.slice(q, 2, HEAD_DIM, 3), g.slice(q, 0, 2, 3)], 3)
    return as_attention_mask(g, logits, turned, k)


def scaled_by_token(g: Builder, logits: str, q: str, k: str) -> str:
    """The term's query is not the logits' query: each channel is weighted."""
    return as_attention_mask(g, logits, g.op("Tanh", q), k)


def of_two_products(g: Builder, logits: str, q: str, k: str) -> str:
    """q . k + k . q of the transposed pair."""
    return g.op("Add", logits, g.transpose(logits, 0, 1, 3, 2))


def gated(g: Builder, logits: str, q: str, k: str) -> str:
    return g.op("Mul", logits, g.op("Sigmoid", q and g.op("ReduceSum", q, g.constant([3]), keepdims=1)))


def heads_mixed(g: Builder, logits: str, q: str, k: str) -> str:
    """Talking heads: a Linear over the heads' logits."""
    mixed = g.matmul(g.transpose(logits, 0, 2, 3, 1), RNG.normal(size=(HEADS, HEADS)))
    return g.transpose(mixed, 0, 3, 1, 2)


def heads_mixed_by_convolution(g: Builder, logits: str, q: str, k: str) -> str:
    return g.op("Conv", logits, g.constant(RNG.normal(size=(HEADS, HEADS, 1, 1))))


INSIDE = "a tensor computed from the windows' own tokens is added to the logits"
LEFT: dict[str, tuple[WithTerm, str]] = {
    "term-of-the-key": (spelled(of_the_key), INSIDE),
    "term-of-the-next-token": (spelled(of_the_next_token), INSIDE),
    "term-of-the-next-head": (spelled(of_the_next_head), INSIDE),
    "term-of-another-query": (spelled(scaled_by_token), INSIDE),
    "gated": (spelled(gated), "a tensor computed from data is multiplied with the logits"),
    "heads-mixed": (spelled(heads_mixed), "the logits of several heads are mixed with one another before the softmax"),
    "heads-mixed-by-convolution": (
        spelled(heads_mixed_by_convolution),
        "the logits of several heads are mixed with one another before the softmax",
    ),
    "logits-twice": (spelled(of_two_products), "the logits are used elsewhere as well"),
}


@pytest.mark.parametrize("case", LEFT)
def test_near_miss_is_left_alone(case: str) -> None:
    spelling, reason = LEFT[case]
    outcome = optimize(spelling.model())
    (site,) = outcome.sites
    assert (site.verdict, outcome.modified) == ("leave", False)
    assert site.reason.startswith(reason), site.reason
    assert site.reason_node


def test_a_term_of_exchanged_channels_keeps_its_numbers() -> None:
    spelling = spelled(of_channels_turned)
    outcome = optimize(spelling.model())
    assert [s.verdict for s in outcome.sites] == ["rewrite"], outcome.sites[0].reason
    inputs = inputs_of(spelling)
    assert error(run(written(outcome), inputs)["y"], run(spelling.model(), inputs)["y"].astype(np.float64)) <= TOLERANCE
