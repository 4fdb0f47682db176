"""Random window attention, most of it wrong in some way: whatever is rewritten must compute what the original computes.

A case draws a map, a window, a shift, padding, a partition, and with some probability a fault: another partition, shift
or token order for one of query, key and value, a merge or roll that does not undo the partition, a softmax over the
wrong axis. A failure names its seed: `python -c "from tests.passes.test_random_windows import draw; print(draw(SEED))"`
shows the case.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest

from attnrewrite.localattention.geometry import WindowGeometry
from tests.models.onnx_builder import Builder
from tests.passes.rewritten import optimize, written

# Axes after [B, rows of windows, rows, columns of windows, columns, C] is split off, and back.
PARTITIONS = {"windows": (0, 1, 3, 2, 4, 5), "columns-first": (0, 3, 1, 2, 4, 5), "transposed": (0, 1, 3, 4, 2, 5)}
Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """What was drawn. partitions, shifts, token_orders: of query, key and value; merge and back: of the output."""

    seed: int
    batch: int | str
    size: Pair
    window: Pair
    heads: int
    head_dim: int
    pad_first: bool
    project_windows: bool
    partitions: tuple[str, str, str]
    shifts: tuple[Pair, Pair, Pair]
    token_orders: tuple[int, int, int]
    merge: str
    back: Pair
    bias: bool
    mask: str
    softmax_axis: int
    residual: bool


def draw(seed: int) -> Case:
    """The case of a seed; about one in three is window attention without a fault."""
    r = random.Random(seed)

    def fault(probability: float) -> bool:
        return r.random() < probability

    window = r.choice([(4, 4), (2, 3), (2, 2), (4, 2)])
    shift = (r.choice([0, 0, 1, window[0] // 2]), r.choice([0, 0, 1, window[1] // 2]))
    partition = r.choice(["windows", "windows", "windows", "columns-first", "transposed"])
    partitions, shifts, orders = [partition] * 3, [shift] * 3, [0] * 3
    if fault(0.2):
        partitions[r.randrange(3)] = r.choice(list(PARTITIONS))
    if fault(0.2):
        shifts[r.randrange(3)] = (r.choice([0, 1, 2]), r.choice([0, 1]))
    if fault(0.2):
        orders = r.choice([[0, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    return Case(
        seed,
        r.choice([1, 2, "batch"]),
        r.choice([(8, 12), (8, 8), (6, 10), (7, 9), (4, 12)]),
        window,
        *r.choice([(1, 5), (3, 5), (2, 4)]),
        fault(0.5),
        fault(0.5),
        (partitions[0], partitions[1], partitions[2]),
        (shifts[0], shifts[1], shifts[2]),
        (orders[0], orders[1], orders[2]),
        r.choice(list(PARTITIONS)) if fault(0.1) else partition,
        (r.choice([0, 1, 2]), r.choice([0, 1])) if fault(0.1) else shift,
        fault(0.5),
        r.choice(["none", "none", "shift", "-100", "-inf"]),
        r.choice([1, 2]) if fault(0.06) else 3,
        fault(0.5),
    )


class Writer:
    """Writes one case as a model: `x [B, H, W, C]` to `y` of the same shape."""

    def __init__(self, case: Case) -> None:
        self.case, self.g = case, Builder()
        self.values = np.random.default_rng(case.seed)
        self.padded = tuple(-(-e // w) * w for e, w in zip(case.size, case.window, strict=True))
        self.tokens, self.channels = case.window[0] * case.window[1], case.heads * case.head_dim

    def ints(self, *values: int) -> str:
        return self.g.constant(np.array(values, np.int64))

    def linear(self, x: str) -> str:
        weight, bias = self.values.normal(size=(self.channels,) * 2) / 2, self.values.normal(size=self.channels)
        product = self.g.op("MatMul", x, self.g.constant(weight))
        return self.g.op("Add", product, self.g.constant(bias))

    def roll(self, x: str, shift: Pair, extents: tuple[int, ...]) -> str:
        for axis, (step, extent) in enumerate(zip(shift, extents, strict=True), start=1):
            if at := step % extent:
                ahead = self.g.op("Slice", x, self.ints(at), self.ints(extent), self.ints(axis))
                x = self.g.op(
                    "Concat", ahead, self.g.op("Slice", x, self.ints(0), self.ints(at), self.ints(axis)), axis=axis
                )
        return x

    def pad(self, x: str) -> str:
        after = [p - e for p, e in zip(self.padded, self.case.size, strict=True)]
        return self.g.op("Pad", x, self.ints(0, 0, 0, 0, 0, *after, 0)) if any(after) else x

    def crop(self, x: str) -> str:
        return self.g.op("Slice", x, self.ints(0, 0), self.ints(*self.case.size), self.ints(1, 2))

    def windows(self, x: str, partition: str, shift: Pair) -> str:
        (rows, columns), case = self.case.window, self.case
        x = self.roll(self.pad(x), shift, self.padded) if case.pad_first else self.pad(self.roll(x, shift, case.size))
        x = self.g.op(
            "Reshape", x, self.ints(-1, self.padded[0] // rows, rows, self.padded[1] // columns, columns, self.channels)
        )
        x = self.g.op("Transpose", x, perm=list(PARTITIONS[partition]))
        return self.g.op("Reshape", x, self.ints(-1, self.tokens, self.channels))

    def merged(self, x: str) -> str:
        (rows, columns), case = self.case.window, self.case
        split = (-1, self.padded[0] // rows, rows, self.padded[1] // columns, columns, self.channels)
        order = PARTITIONS[case.merge]
        x = self.g.op("Reshape", x, self.ints(*(split[a] for a in order)))
        x = self.g.op("Transpose", x, perm=np.argsort(order).tolist())
        x = self.g.op("Reshape", x, self.ints(-1, *self.padded, self.channels))
        back = (-case.back[0], -case.back[1])
        return (
            self.crop(self.roll(x, back, self.padded)) if case.pad_first else self.roll(self.crop(x), back, case.size)
        )

    def heads(self, x: str, order: int) -> str:
        x = self.g.op("Reshape", x, self.ints(-1, self.tokens, self.case.heads, self.case.head_dim))
        x = self.g.op("Transpose", x, perm=[0, 2, 1, 3])
        shuffled = random.Random(self.case.seed).sample(range(self.tokens), self.tokens)
        return self.g.op("Gather", x, self.ints(*shuffled), axis=2) if order else x

    def mask(self) -> np.ndarray:
        """[nW, 1, N, N]; every row keeps one key."""
        case = self.case
        if case.mask == "shift":
            shift = tuple(s % w for s, w in zip(case.shifts[0], case.window, strict=True))
            crosses = WindowGeometry(case.size, case.window, shift, case.pad_first).crosses_regions()
            return np.where(crosses[:, None], -100.0, 0.0)
        windows = self.padded[0] // case.window[0] * (self.padded[1] // case.window[1])
        masked = self.values.random((windows, 1, self.tokens, self.tokens)) < 0.3
        masked[..., 0] = False
        return np.where(masked, float(case.mask), 0.0)

    def logits(self, query: str, key: str) -> str:
        case = self.case
        scaled = self.g.op("Mul", query, self.g.constant(np.array(0.4)))
        x = self.g.op("MatMul", scaled, self.g.op("Transpose", key, perm=[0, 1, 3, 2]))
        if case.bias:
            x = self.g.op("Add", x, self.g.constant(self.values.normal(size=(1, case.heads, self.tokens, self.tokens))))
        if case.mask != "none":
            mask = self.mask()
            view = self.g.op("Reshape", x, self.ints(-1, len(mask), case.heads, self.tokens, self.tokens))
            view = self.g.op("Add", view, self.g.constant(mask))
            x = self.g.op("Reshape", view, self.ints(-1, case.heads, self.tokens, self.tokens))
        return x

    def model(self) -> onnx.ModelProto:
        case = self.case
        x = self.g.input("x", [case.batch, *case.size, self.channels])
        operands = []
        for partition, shift, order in zip(case.partitions, case.shifts, case.token_orders, strict=True):
            windows = self.windows(x if case.project_windows else self.linear(x), partition, shift)
            operands.append(self.heads(self.linear(windows) if case.project_windows else windows, order))
        weights = self.g.op("Softmax", self.logits(operands[0], operands[1]), axis=case.softmax_axis)
        attended = self.g.op("Transpose", self.g.op("MatMul", weights, operands[2]), perm=[0, 2, 1, 3])
        merged = self.merged(self.g.op("Reshape", attended, self.ints(-1, self.tokens, self.channels)))
        return self.g.model({"y": self.g.op("Add", merged, x) if case.residual else self.linear(merged)})


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def check(seed: int) -> str:
    """Rewrite the case of a seed; the verdict. Fails where the rewritten model computes something else."""
    case = draw(seed)
    model = Writer(case).model()
    outcome = optimize(model)
    (site,) = outcome.sites
    if site.verdict == "rewrite":
        batch = 2 if case.batch == "batch" else case.batch
        x = np.random.default_rng(seed).normal(size=(batch, *case.size, case.heads * case.head_dim)).astype(np.float32)
        expected, found = run(model, x), run(written(outcome), x)
        scale = np.nanmax(np.abs(expected))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale, equal_nan=True, err_msg=repr(case))
    return site.verdict


@pytest.mark.parametrize("block", range(4))
def test_what_is_rewritten_is_right(block: int) -> None:
    verdicts = Counter(check(seed) for seed in range(block * 40, block * 40 + 40))
    assert min(verdicts["rewrite"], verdicts["leave"]) >= 8, verdicts  # the draw covers both


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_what_is_rewritten_is_right_in_many_cases(block: int) -> None:
    for seed in range(1000 + block * 100, 1100 + block * 100):
        check(seed)
