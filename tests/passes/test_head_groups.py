"""Heads of one softmax with windows of their own: one op where they differ by a shift alone; else left, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest

from attnrewrite.functions import spec_of
from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import WindowGeometry
from tests.models import onnx_movement as movement
from tests.models.onnx_builder import Builder
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

HEADS, HEAD_DIM = 4, 3
CHANNELS = HEADS * HEAD_DIM
SIZE, WINDOW, TOKENS = (8, 12), (4, 4), 16
RANDOM = np.random.default_rng(0)
QKV, BIAS = RANDOM.normal(size=(CHANNELS, 3 * CHANNELS)), RANDOM.normal(size=(HEADS, TOKENS, TOKENS))
PLAIN, BOTH, ROWS = (0, 0), (2, 2), (2, 0)


@dataclass(frozen=True)
class Heads:
    """Heads in a row. key_shift, back: how keys and values are shifted, and the output back, if in another way."""

    count: int
    shift: tuple[int, int]
    key_shift: tuple[int, int] | None = None
    back: tuple[int, int] | None = None
    window: tuple[int, int] = WINDOW
    penalty: float | None = None

    def geometry(self, size: tuple[int, int], shift: tuple[int, int] | None = None) -> WindowGeometry:
        return WindowGeometry(size, self.window, self.shift if shift is None else shift, shift_padded=True)


def model(
    *groups: Heads, size: tuple[int, int] = SIZE, apart: bool = False, computed: bool = False, scales: bool = False
) -> onnx.ModelProto:
    """Attention in windows, the heads in groups, all in one softmax.

    apart: every group has a Linear of its own. computed: a mask made from data is added. scales: a scale per head.
    """
    g = Builder()
    x = g.input("x", ["batch", *size, CHANNELS])
    widths = [3 * h.count * HEAD_DIM for h in groups]
    if apart:
        parts = [g.matmul(x, weights) for weights in np.split(QKV, np.cumsum(widths)[:-1], axis=1)]
    else:
        parts = g.split(g.matmul(x, QKV), widths, 3)
    cut: list[list[str]] = [[], [], []]
    for part, heads in zip(parts, groups, strict=True):
        for which, tensor in enumerate(g.split(part, [heads.count * HEAD_DIM] * 3, 3)):
            geometry = heads.geometry(size, heads.key_shift if which else None)
            tokens = movement.Movement().enter(g, tensor, geometry, heads.count * HEAD_DIM)
            cut[which].append(g.transpose(g.reshape(tokens, -1, TOKENS, heads.count, HEAD_DIM), 0, 2, 1, 3))
    q, k, v = (g.concat(tensors, 1) if len(tensors) > 1 else tensors[0] for tensors in cut)
    logits = g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2))
    if scales:
        logits = g.op("Mul", logits, g.constant(np.linspace(0.5, 1.0, HEADS).reshape(HEADS, 1, 1)))
    logits = g.op("Add", logits, g.constant(BIAS))
    if any(h.penalty is not None for h in groups):
        logits = added(g, logits, mask(groups, size))
    if computed:
        mean = g.op("ReduceMean", x, axes=[1, 2, 3], keepdims=1)
        logits = added(g, logits, g.reshape(mean, -1, 1, 1, 1, 1), groups[0].geometry(size).num_windows)
    out = g.op("MatMul", g.op("Softmax", logits, axis=-1), v)
    merged = []
    for group, heads in zip(g.split(out, [h.count for h in groups], 1), groups, strict=True):
        width = heads.count * HEAD_DIM
        tokens = g.reshape(g.transpose(group, 0, 2, 1, 3), -1, TOKENS, width)
        merged.append(movement.Movement().leave(g, tokens, heads.geometry(size, heads.back), width))
    return g.model({"y": g.concat(merged, 3)})


def mask(groups: Sequence[Heads], size: tuple[int, int]) -> np.ndarray:
    """[nW, nH, N, N]: every group's penalty where query and key are of different regions."""
    parts = []
    for heads in groups:
        crosses = heads.geometry(size).crosses_regions()
        parts += [np.where(crosses, heads.penalty or 0.0, 0.0)] * heads.count
    return np.stack(parts, axis=1)


def added(g: Builder, logits: str, term: np.ndarray | str, windows: int | None = None) -> str:
    """logits [B*nW, nH, N, N] + term, in a view with the batch apart."""
    count = len(term) if isinstance(term, np.ndarray) else windows
    assert count is not None
    view = g.reshape(logits, -1, count, HEADS, TOKENS, TOKENS)
    total = g.op("Add", view, term if isinstance(term, str) else g.constant(term))
    return g.reshape(total, -1, HEADS, TOKENS, TOKENS)


REWRITTEN: dict[str, tuple[tuple[Heads, ...], dict[str, object], dict[str, object]]] = {
    "half of them": ((Heads(2, PLAIN), Heads(2, BOTH)), {}, {"head_shifts": (PLAIN, BOTH)}),
    "unequal groups": ((Heads(1, PLAIN), Heads(3, BOTH)), {}, {"head_shifts": (PLAIN, BOTH, BOTH, BOTH)}),
    "every head": (
        tuple(Heads(1, s) for s in (BOTH, PLAIN, ROWS, (1, 3))),
        {},
        {"head_shifts": (BOTH, PLAIN, ROWS, (1, 3))},
    ),
    "in turn": (
        tuple(Heads(1, s) for s in (PLAIN, BOTH, PLAIN, BOTH)),
        {},
        {"head_shifts": (PLAIN, BOTH, PLAIN, BOTH)},
    ),
    "masked": (
        (Heads(2, PLAIN, penalty=-100.0), Heads(2, BOTH, penalty=-100.0)),
        {},
        {"head_shifts": (PLAIN, BOTH), "mask_value": -100.0},
    ),
    "masked by two numbers": (
        (Heads(2, ROWS, penalty=-50.0), Heads(2, BOTH, penalty=-np.inf)),
        {},
        {"head_shifts": (ROWS, BOTH), "mask_value": None},
    ),
    "masked in part": (
        (Heads(2, ROWS), Heads(2, BOTH, penalty=-100.0)),
        {},
        {"head_shifts": (ROWS, BOTH), "mask_value": None},
    ),
    "padded": (
        (Heads(2, PLAIN, penalty=-100.0), Heads(2, BOTH, penalty=-100.0)),
        {"size": (7, 10)},
        {"head_shifts": (PLAIN, BOTH), "mask_value": -100.0},
    ),
    "Linear layers of their own": ((Heads(2, PLAIN), Heads(2, BOTH)), {"apart": True}, {"head_shifts": (PLAIN, BOTH)}),
    "scaled head by head": ((Heads(2, PLAIN), Heads(2, BOTH)), {"scales": True}, {"head_shifts": (PLAIN, BOTH)}),
    "one shift": ((Heads(1, BOTH), Heads(3, BOTH)), {}, {"head_shifts": ()}),
    "one shift, Linear layers of their own": ((Heads(1, BOTH), Heads(3, BOTH)), {"apart": True}, {"head_shifts": ()}),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_heads_with_shifts_of_their_own_are_one_op(name: str) -> None:
    groups, options, expected = REWRITTEN[name]
    original = model(*groups, **options)  # type: ignore[arg-type]
    outcome = optimize(original)
    (site,) = outcome.sites
    assert site.verdict == "rewrite", site.reason
    (op,) = local_ops(outcome.graph)
    spec = spec_of(op)
    assert isinstance(spec, FlashWindowAttention)
    assert (spec.num_heads, spec.geometry.window_size) == (HEADS, WINDOW)
    for attribute, value in expected.items():
        assert getattr(spec, attribute) == value
    assert site.head_shifts == (spec.head_shifts or None)
    assert not left_over(outcome.graph)
    feeds = {"x": RANDOM.normal(size=(2, *groups_size(options), CHANNELS)).astype(np.float32)}
    assert error(run(written(outcome), feeds)["y"], run(original, feeds)["y"]) <= 3e-6


def groups_size(options: dict[str, object]) -> tuple[int, int]:
    return options.get("size", SIZE)  # type: ignore[return-value]


HALF = (Heads(2, PLAIN), Heads(2, BOTH))
LEFT: dict[str, tuple[tuple[Heads, ...], dict[str, object], str]] = {
    "the keys of two heads are not shifted": (
        (HALF[0], Heads(2, BOTH, key_shift=PLAIN, back=BOTH)),
        {},
        "head 2 reads other pixels than head 1; of heads 2 to 3, the keys are not those of the queries' window",
    ),
    "the output of two heads is not shifted back": (
        (HALF[0], Heads(2, BOTH, back=PLAIN)),
        {},
        "head 2 reads other pixels than head 1; of heads 2 to 3, the tokens are rearranged before the attention",
    ),
    "all outputs are shifted back": (
        (Heads(2, PLAIN, back=BOTH), Heads(2, BOTH)),
        {},
        "head 2 reads other pixels than head 1; of heads 0 to 1, the output is rearranged once more",
    ),
    "windows of two forms": (
        (HALF[0], Heads(2, PLAIN, window=(2, 8))),
        {"size": (8, 16)},
        "head 2 reads other pixels than head 1: their windows differ by more than a shift",
    ),
    "a mask computed from data": (
        HALF,
        {"computed": True},
        "head 2 reads other pixels than head 1, and what is added to the logits is computed from data",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_heads_that_differ_by_more_are_left(name: str) -> None:
    groups, options, reason = LEFT[name]
    outcome = optimize(model(*groups, **options))  # type: ignore[arg-type]
    (site,) = outcome.sites
    assert site.verdict == "leave"
    assert site.reason.startswith(reason), site.reason
    assert not outcome.modified


def test_the_report_says_the_shifts() -> None:
    outcome = optimize(model(*(replace(h, penalty=-100.0) for h in HALF)))
    (site,) = outcome.sites
    assert site.to_json()["head_shifts"] == [[0, 0], [2, 2]]
    assert (site.kind, site.mask) == ("window", "shift")
    assert "4x4 windows, shifted by 0x0, 2x2 for one group of heads after the other" in site.reason
