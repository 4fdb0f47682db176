"""Masks and scales: what a mask excludes, what it only weakens, and what the op must carry so that both stay true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from attnrewrite.frontend import fold
from attnrewrite.functions import operands_of, spec_of
from attnrewrite.functions.spec import FlashWindowAttention
from tests.models import onnx_parts as parts
from tests.models.onnx_builder import Builder
from tests.models.onnx_spellings import UNSHIFTED, WINDOW, sample_input
from tests.models.onnx_windows import HEADS, SHIFTED, WindowSpelling
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

TOLERANCE = 5e-6  # as in test_spellings; logits of some hundreds add 1e-5
LOWEST = float(np.finfo(np.float32).min)
CROSSES = SHIFTED.crosses_regions()
ROW = np.zeros_like(CROSSES)
ROW[2, 5] = True  # every key of one query of one window

OnLogits = Callable[[Builder, str, WindowSpelling], str]


def masked(values: np.ndarray) -> WindowSpelling:
    return replace(WINDOW, mask_values=values)


def where(condition: np.ndarray, number: float) -> OnLogits:
    """Where(condition, number, logits)."""

    def write(g: Builder, logits: str, spelling: WindowSpelling) -> str:
        windows = g.reshape(logits, -1, 6, HEADS, 16, 16)
        chosen = g.op("Where", g.constant(condition[None, :, None]), g.constant(np.float64(number)), windows)
        return g.reshape(chosen, -1, HEADS, 16, 16)

    return write


def written_by(mask: OnLogits, of: WindowSpelling = WINDOW, **changes: Any) -> WindowSpelling:
    return replace(of, mask=mask, **changes)


def weights_of(spelling: WindowSpelling, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray, FlashWindowAttention]:
    """(found, expected by ONNX Runtime on the original, the op), on an input scaled by `factor`."""
    model = spelling.model()
    inputs = {"x": factor * sample_input(spelling)["x"]}
    outcome = optimize(spelling.model())
    assert [s.verdict for s in outcome.sites] == ["rewrite"], outcome.sites[0].reason
    assert not left_over(outcome.graph)
    (node,) = local_ops(outcome.graph)
    spec = spec_of(node)
    assert isinstance(spec, FlashWindowAttention)
    return run(written(outcome), inputs)["y"], run(model, inputs)["y"], spec


def expanded(g: Builder, constant: np.ndarray) -> str:
    """A constant [1, nW, 1, N, N] as large as the logits, as [B * nW, nH, N, N] of a symbolic batch."""
    batch = g.slice(g.op("Shape", "x"), 0, 1, 0)
    shape = g.concat([batch, g.constant([6, HEADS, 16, 16])], 0)
    return g.reshape(g.op("Expand", g.constant(constant[None, :, None]), shape), -1, HEADS, 16, 16)


def expanded_condition(condition: np.ndarray, number: float) -> OnLogits:
    """Where(Not(Cast(Expand(kept))), number, logits), kept the numbers 1 and 0."""

    def write(g: Builder, logits: str, spelling: WindowSpelling) -> str:
        kept = expanded(g, np.where(condition, 0.0, 1.0))
        masked = g.op("Not", g.op("Cast", kept, to=TensorProto.BOOL))
        return g.op("Where", masked, g.constant(np.float64(number)), logits)

    return write


def expanded_mask(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """logits + Expand(mask)."""
    return g.op("Add", logits, expanded(g, np.where(CROSSES, -100.0, 0.0)))


DYNAMIC = replace(WINDOW, batch="batch")

# The mask, the factor on the input, and the penalty that the op carries (None: the mask is a tensor of its own).
PENALTIES: dict[str, tuple[WindowSpelling, float, float | None]] = {
    "minus-100": (WINDOW, 1.0, -100.0),
    "minus-100-beside-larger-logits": (WINDOW, 30.0, -100.0),
    "minus-infinity-added": (masked(np.where(CROSSES, -np.inf, 0.0)), 30.0, -np.inf),
    "minus-infinity-chosen": (written_by(where(CROSSES, -np.inf)), 30.0, -np.inf),
    "chosen-by-an-expanded-condition": (written_by(expanded_condition(CROSSES, LOWEST), DYNAMIC), 30.0, -np.inf),
    "an-expanded-condition-that-is-no-shift": (
        written_by(expanded_condition(CROSSES & (np.arange(16) % 2 == 0), LOWEST), DYNAMIC),
        1.0,
        None,
    ),
    "an-expanded-mask": (written_by(expanded_mask, DYNAMIC), 30.0, -100.0),
    "lowest-added": (masked(np.where(CROSSES, LOWEST, 0.0)), 30.0, LOWEST),
    "lowest-chosen": (written_by(where(CROSSES, LOWEST)), 30.0, -np.inf),
    "almost-the-shift-mask": (masked(np.where(CROSSES, -100.0, 0.0) + np.where(ROW, -50.0, 0.0)), 1.0, None),
    "two-penalties": (masked(np.where(CROSSES, -100.0, -1.0)), 1.0, None),
    "part-of-the-shift-mask": (masked(np.where(CROSSES & (np.arange(16) % 2 == 0), -100.0, 0.0)), 1.0, None),
    "a-row-of-lowest-added": (masked(np.where(ROW, LOWEST, 0.0)), 1.0, None),
    "a-row-of-minus-100": (masked(np.where(ROW, -100.0, 0.0)), 1.0, None),
}


@pytest.mark.parametrize("case", PENALTIES)
def test_mask_and_its_penalty(case: str) -> None:
    spelling, factor, penalty = PENALTIES[case]
    found, expected, spec = weights_of(spelling, factor)
    assert spec.mask_value == penalty
    assert error(found, expected) <= max(TOLERANCE, 4e-7 * factor**2)


def test_a_mask_of_minus_100_excludes_nothing() -> None:
    """Where logits reach some hundreds, an excluding mask would give other numbers: the test above can tell."""
    spelling = PENALTIES["minus-100-beside-larger-logits"][0]
    inputs = 30 * sample_input(spelling)["x"]
    excluding = masked(np.where(CROSSES, -np.inf, 0.0))
    assert error(excluding.evaluate(inputs), spelling.evaluate(inputs)) > 1e-2


def test_a_row_that_is_excluded_whole_is_not_a_number_before_and_after() -> None:
    found, expected, _ = weights_of(masked(np.where(ROW, -np.inf, 0.0)))
    assert np.isnan(expected).any()
    assert error(found, expected) <= TOLERANCE


def per_window_and_head(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """A bias that differs from window to window and from head to head."""
    values = np.random.default_rng(3).normal(size=(1, 6, HEADS, 16, 16))
    windows = g.add(g.reshape(logits, -1, 6, HEADS, 16, 16), values)
    return g.reshape(windows, -1, HEADS, 16, 16)


def test_a_bias_of_every_window_and_head() -> None:
    spelling = replace(WINDOW, mask=per_window_and_head)
    (node,) = local_ops(optimize(spelling.model()).graph)
    assert operands_of(node)["bias"].shape == (6, HEADS, 16, 16)
    found, expected, spec = weights_of(spelling)
    assert spec.mask_value is None
    assert error(found, expected) <= TOLERANCE


def computed_mask(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """logits + where(region[i] == region[j], 0, -100), of constants alone."""
    region = CROSSES.argmin(axis=-1).astype(np.float64)  # the first token of the same region
    rows, columns = g.constant(region[None, :, None, :, None]), g.constant(region[None, :, None, None, :])
    same = g.op("Equal", g.op("Sub", rows, columns), g.constant(np.float64(0.0)))
    mask = g.op("Where", same, g.constant(np.float64(0.0)), g.constant(np.float64(-100.0)))
    return g.reshape(g.op("Add", g.reshape(logits, -1, 6, HEADS, 16, 16), mask), -1, HEADS, 16, 16)


@pytest.mark.parametrize(("limit", "penalty"), [(1 << 25, -100.0), (0, None)])
def test_a_mask_computed_from_constants(monkeypatch: pytest.MonkeyPatch, limit: int, penalty: float | None) -> None:
    """One that is too large to be folded stays computed, and is an operand."""
    monkeypatch.setattr(fold, "GROWTH_LIMIT_BYTES", limit)
    spelling = written_by(computed_mask)
    found, expected, spec = weights_of(spelling)
    (node,) = local_ops(optimize(spelling.model()).graph)
    assert spec.mask_value == penalty
    assert ("logit_bias" in operands_of(node)) == (penalty is None)
    assert error(found, expected) <= TOLERANCE


# Scales.


def scaled_after(scale: Any) -> OnLogits:
    """The bias is added first, then all is scaled; the mask comes after."""
    return lambda g, logits, spelling: g.mul(parts.bias_constant(g, logits, spelling), scale)


def scaled_before(scale: Any) -> OnLogits:
    return lambda g, logits, spelling: parts.bias_constant(g, g.mul(logits, scale), spelling)


PER_HEAD = np.array([0.5, 7.0, 31.0])[:, None, None]


def cosine(g: Builder, q: str, k: str, scale: float) -> str:
    """q / max(|q|, 1e-12) . k / max(|k|, 1e-12): Swin V2."""
    unit = []
    for value in (q, k):
        norm = g.op("Clip", g.op("ReduceL2", value, axes=[-1], keepdims=1), g.constant(np.float64(1e-12)))
        unit.append(g.op("Div", value, norm))
    return g.op("MatMul", unit[0], g.transpose(unit[1], 0, 1, 3, 2))


def root(g: Builder, q: str, k: str, scale: float) -> str:
    """q k^T / sqrt(d), the root computed in the graph."""
    return g.op("Div", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), g.op("Sqrt", g.constant(np.float64(5.0))))


SCALES: dict[str, tuple[WindowSpelling, float]] = {
    # the spelling, and the scale that the op carries (1 where it differs from head to head: it is in the query then)
    "root-computed": (replace(WINDOW, logits=root), 5**-0.5),
    "bias-scaled-too": (replace(WINDOW, bias=scaled_after(0.25)), 0.25 * 5**-0.5),
    "per-head": (replace(WINDOW, bias=scaled_before(PER_HEAD)), 1.0),
    "per-head-bias-too": (replace(WINDOW, bias=scaled_after(PER_HEAD)), 1.0),
    "cosine": (replace(WINDOW, logits=cosine), 1.0),
    "cosine-per-head": (replace(WINDOW, logits=cosine, bias=scaled_before(PER_HEAD)), 1.0),
    "negative": (replace(WINDOW, bias=scaled_before(-2.0)), -2.0 * 5**-0.5),
}


@pytest.mark.parametrize("case", SCALES)
def test_scale(case: str) -> None:
    spelling, scale = SCALES[case]
    found, expected, spec = weights_of(spelling)
    assert spec.scale == pytest.approx(scale, rel=1e-6)
    assert error(found, expected) <= TOLERANCE


# What must be left alone.


def of_input(change: Callable[[Builder, str, str], str]) -> OnLogits:
    """`change(g, logits as [B, nW, nH, N, N], the model's second input)`."""

    def write(g: Builder, logits: str, spelling: WindowSpelling) -> str:
        mask = g.input("mask", [1, 6, 1, 16, 16])
        return g.reshape(change(g, g.reshape(logits, -1, 6, HEADS, 16, 16), mask), -1, HEADS, 16, 16)

    return write


def rounded(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Cut to whole numbers on the way: a cast that is no change of precision."""
    return g.op("Cast", g.op("Cast", logits, to=TensorProto.INT32), to=TensorProto.FLOAT)


def rounded_probabilities(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    weights = g.op("Softmax", logits, axis=-1)
    return g.op("Cast", g.op("Cast", weights, to=TensorProto.BOOL), to=TensorProto.FLOAT)


def in_training(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    weights = g.op("Softmax", logits, axis=-1)
    return g.op("Dropout", weights, g.constant(np.float64(0.5)), g.constant(np.array(True)), seed=1)


def excluded_then_negated(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """-(logits with -inf): infinite weights, not excluded keys."""
    return g.mul(where(CROSSES, -np.inf)(g, logits, spelling), -1.0)


def excluded_then_times_zero(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """0 * -inf is not a number."""
    return g.mul(where(CROSSES, -np.inf)(g, logits, spelling), 0.0)


def guarded_otherwise(number: float, *, inverted: bool = False) -> OnLogits:
    """The guard of rows without keys, but for one thing."""

    def write(g: Builder, logits: str, spelling: WindowSpelling) -> str:
        weights = g.op("Softmax", logits, axis=-1)
        chosen = [g.constant(number), weights]
        return g.op("Where", g.op("IsNaN", weights), *(reversed(chosen) if inverted else chosen))

    return write


NO_KEY = "a query that its mask leaves no key gives zeros here"
TWICE = "the attention probabilities have 2 uses"
LEFT: dict[str, tuple[WindowSpelling, str]] = {
    "guarded-row-without-keys": (
        replace(masked(np.where(ROW, -np.inf, 0.0)), softmax=parts.softmax_guarded),
        NO_KEY,
    ),
    "guarded-data-dependent-mask": (
        written_by(of_input(lambda g, logits, mask: g.op("Add", logits, mask)), softmax=parts.softmax_guarded),
        NO_KEY,
    ),
    "guarded-by-ones": (replace(UNSHIFTED, softmax=guarded_otherwise(1.0)), TWICE),
    "guarded-inverted": (replace(UNSHIFTED, softmax=guarded_otherwise(0.0, inverted=True)), TWICE),
    "chosen-minus-100": (
        written_by(where(CROSSES, -100.0)),
        "masked logits are set to -100, which is no exclusion",
    ),
    "a-row-of-lowest-chosen": (
        written_by(where(ROW, LOWEST)),
        "a query has all its keys masked by a finite number",
    ),
    "scale-is-an-input": (
        written_by(of_input(lambda g, logits, mask: g.op("Mul", mask, logits))),
        "a tensor computed from data is multiplied with the logits",
    ),
    "number-over-logits": (
        replace(WINDOW, bias=lambda g, logits, s: g.op("Div", g.constant(1.0), logits)),
        "the logits are the second operand of Div",
    ),
    "logits-rounded": (replace(UNSHIFTED, mask=rounded), "the logits come from Cast"),
    "probabilities-rounded": (replace(UNSHIFTED, softmax=rounded_probabilities), "the probabilities go into Cast"),
    "dropout-in-training": (replace(UNSHIFTED, softmax=in_training), "the probabilities go into Dropout"),
    "excluded-then-negated": (written_by(excluded_then_negated), "the logits are scaled after keys were excluded"),
    "excluded-then-times-zero": (
        written_by(excluded_then_times_zero),
        "the logits are scaled after keys were excluded",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone_with_the_reason(case: str) -> None:
    spelling, reason = LEFT[case]
    outcome = optimize(spelling.model())
    (site,) = outcome.sites
    assert (site.verdict, outcome.modified) == ("leave", False)
    assert site.reason.startswith(reason), site.reason


def test_float16_mask_keeps_minus_infinity() -> None:
    spelling = replace(masked(np.where(CROSSES, -np.inf, 0.0)), element_type=TensorProto.FLOAT16)
    found, expected, spec = weights_of(spelling)
    assert spec.mask_value == -np.inf
    assert error(found, expected) <= 5e-3


def test_operands_hold_the_bias_as_it_was(tmp_path: object) -> None:
    """Bit for bit: folding in float64 must not move it."""
    outcome = optimize(WINDOW.model())
    (node,) = local_ops(outcome.graph)
    bias = operands_of(node)["bias"].constant
    stored = [onnx.numpy_helper.to_array(t) for t in WINDOW.model().graph.initializer]
    assert any(s.shape == bias.shape and np.array_equal(s, bias) for s in stored)
