"""Random branches of one input, in float64: whatever they are made of, one convolution is left that does the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from attnrewrite.frontend.onnx import read
from tests.models.onnx_builder import Builder
from tests.passes.rewritten import optimize, written
from tests.running import error

CHANNELS, SIZE = 6, (7, 9)
REACH = 4  # of the widest branch, in pixels on either side


@dataclass
class Network:
    """Branches of x [2, 6, 7, 9] with one stride, written one after the other."""

    g: Builder
    rng: np.random.Generator
    stride: int

    def conv(
        self,
        x: str,
        size: int,
        *,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = True,
        step: int | None = None,
        read: int = CHANNELS,
        filters: int = CHANNELS,
    ) -> str:
        """Padded to keep its centre."""
        weight = self.g.constant(self.rng.normal(size=(filters, read // groups, size, size)))
        operands = [weight, self.g.constant(self.rng.normal(size=filters))] if bias else [weight]
        step = self.stride if step is None else step
        pads = [dilation * (size // 2)] * 4
        return self.g.op("Conv", x, *operands, pads=pads, group=groups, strides=[step] * 2, dilations=[dilation] * 2)

    def normal(self, x: str) -> str:
        scale, bias, mean = (self.g.constant(self.rng.normal(size=CHANNELS)) for _ in range(3))
        return self.g.op(
            "BatchNormalization", x, scale, bias, mean, self.g.constant(self.rng.uniform(0.5, 2, CHANNELS))
        )

    def pool(self, x: str, size: int) -> str:
        return self.g.op(
            "AveragePool",
            x,
            kernel_shape=[size] * 2,
            pads=[size // 2] * 4,
            strides=[self.stride] * 2,
            count_include_pad=1,
        )

    def per_channel(self, op: str, x: str) -> str:
        return self.g.op(op, x, self.g.constant(self.rng.uniform(0.5, 2, (CHANNELS, 1, 1))))


Branch = Callable[[Network, str], str]
GROUPS = st.sampled_from([1, 2, 3, CHANNELS])


@st.composite
def convolutions(draw: st.DrawFn) -> Branch:
    size = draw(st.sampled_from([1, 3, 5]))
    dilation = draw(st.integers(1, 2)) if size > 1 else 1
    groups, bias = draw(GROUPS), draw(st.booleans())
    return lambda n, x: n.conv(x, size, groups=groups, dilation=dilation, bias=bias)


@st.composite
def widened(draw: st.DrawFn) -> Branch:
    """1 x 1 to more channels, and k x k back; the padding is exact because the first has no bias."""
    size, more = draw(st.sampled_from([1, 3])), draw(st.sampled_from([6, 12]))

    def branch(n: Network, x: str) -> str:
        wide = n.conv(x, 1, bias=False, step=1, filters=more)
        return n.conv(wide, size, read=more)

    return branch


@st.composite
def projected(draw: st.DrawFn) -> Branch:
    """k x k, depthwise or in groups, and 1 x 1 after it, which may have any bias."""
    groups = draw(GROUPS)
    return lambda n, x: n.conv(n.conv(x, 3, groups=groups), 1, step=1)


@st.composite
def pools(draw: st.DrawFn) -> Branch:
    size = draw(st.sampled_from([1, 3, 5]))
    return lambda n, x: n.pool(x, size)


def identity(n: Network, x: str) -> str:
    return x if n.stride == 1 else n.conv(x, 1, groups=CHANNELS)


AFTERWARDS: list[Branch] = [
    lambda n, x: n.normal(x),
    lambda n, x: n.per_channel("Mul", x),
    lambda n, x: n.per_channel("Div", x),
    lambda n, x: n.per_channel("Add", x),
    lambda n, x: n.per_channel("Sub", x),
    lambda n, x: n.g.mul(x, -0.5),
    lambda n, x: n.g.op("Neg", x),
    lambda n, x: n.conv(n.conv(x, 1, step=1), 1, step=1),
]


@st.composite
def branches(draw: st.DrawFn) -> Branch:
    kinds = [convolutions(), widened(), projected(), pools(), st.just(identity)]
    first = draw(st.one_of(kinds))
    after = draw(st.lists(st.sampled_from(AFTERWARDS), max_size=2))

    def branch(n: Network, x: str) -> str:
        value = first(n, x)
        for step in after:
            value = step(n, value)
        return value

    return branch


def added(g: Builder, values: list[str], signs: list[bool]) -> str:
    total = values[0]
    for value, plus in zip(values[1:], signs, strict=False):
        total = g.op("Add" if plus else "Sub", total, value)
    return total


def evaluate(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    (found,) = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(found)


@settings(max_examples=40, deadline=None)
@given(
    some=st.lists(branches(), min_size=1, max_size=4),
    stride=st.integers(1, 2),
    signs=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_one_convolution_is_left(some: list[Branch], stride: int, signs: list[bool], seed: int) -> None:
    """A dense kernel as wide as any of them is among the branches, so that one kernel for all always pays."""
    network = Network(Builder(element_type=TensorProto.DOUBLE), np.random.default_rng(seed), stride)
    x = network.g.input("x", [2, CHANNELS, *SIZE])
    values = [network.conv(x, 2 * REACH + 1), *(branch(network, x) for branch in some)]
    model = network.g.model({"y": added(network.g, values, signs)})
    outcome = optimize(model, ["fold-reparam-branches"])
    assert [n.op for n in outcome.graph.nodes] == ["Conv", "Identity"]
    (record,) = outcome.reparam
    assert (record.branches, record.verdict) == (len(values), "rewrite")
    numbers = np.random.default_rng(1).normal(size=(2, CHANNELS, *SIZE))
    assert error(evaluate(written(outcome), numbers), evaluate(model, numbers)) <= 1e-10


def padded(n: Network, x: str) -> str:
    """Zeros around, then a convolution that takes them off again."""
    weight = n.g.constant(n.rng.normal(size=(CHANNELS, CHANNELS, 2, 3)))
    return n.g.op("Conv", n.g.pad(x, [0, 0, 1, 0], [0, 0, 0, 2]), weight)


UNARY: list[Branch] = [
    *AFTERWARDS,
    padded,
    lambda n, x: n.conv(x, 3),
    lambda n, x: n.conv(x, 3, groups=3, bias=False),
    lambda n, x: n.conv(x, 1, bias=False),
    lambda n, x: n.conv(x, 5, groups=CHANNELS, dilation=2),
    lambda n, x: n.pool(x, 3),
    lambda n, x: n.g.op("Relu", x),
    lambda n, x: n.g.op("Identity", x),
    lambda n, x: n.g.add(x, n.rng.normal(size=SIZE)),
]
# The operator, and which of the values so far it reads, counted from the latest.
STEPS = st.tuples(st.integers(0, len(UNARY) + 5), st.integers(0, 4), st.integers(0, 4))


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=2, max_size=14),
    outputs=st.sets(st.integers(0, 14), max_size=2),
    seed=st.integers(0, 2**16),
)
def test_any_graph_computes_the_same(steps: list[tuple[int, int, int]], outputs: set[int], seed: int) -> None:
    """Values used by several nodes, sums of sums, borders that would change: whatever is folded is equal."""
    n = Network(Builder(element_type=TensorProto.DOUBLE), np.random.default_rng(seed), stride=1)
    values = [n.g.input("x", [2, CHANNELS, *SIZE])]
    for kind, first, second in steps:
        one, other = (values[-1 - min(k, len(values) - 1)] for k in (first, second))
        binary = n.g.op("Sub" if kind % 2 else "Add", one, other) if kind >= len(UNARY) else None
        values.append(binary or UNARY[kind](n, one))
    seen = {len(values) - 1, *(k for k in outputs if 0 < k < len(values))}
    model = n.g.model({f"y{k}": values[k] for k in sorted(seen)})
    outcome = optimize(model, ["fold-reparam-branches"])
    assert outcome.nodes_after <= outcome.nodes_before
    x = {"x": np.random.default_rng(1).normal(size=(2, CHANNELS, *SIZE))}
    results = zip(
        ReferenceEvaluator(written(outcome)).run(None, x), ReferenceEvaluator(model).run(None, x), strict=True
    )
    for found, expected in results:
        assert error(np.asarray(found), np.asarray(expected)) <= 1e-10


NearMiss = Callable[[Network, str, str], str]


def quantised(n: Network, x: str) -> str:
    scale, zero = n.g.constant(0.5), n.g.op("Cast", n.g.constant(3), to=TensorProto.UINT8)
    return n.g.op("DequantizeLinear", n.g.op("QuantizeLinear", x, scale, zero), scale, zero)


def read_twice(n: Network, one: str, other: str) -> str:
    return n.g.op("Mul", n.g.op("Add", one, other), n.g.op("Sigmoid", other))


NEAR_MISSES: dict[str, tuple[NearMiss, str | None]] = {
    "activation": (lambda n, a, b: n.g.op("Add", a, n.g.op("Tanh", b)), "Tanh is no linear operator"),
    "both-activated": (
        lambda n, a, b: n.g.op("Sub", n.g.op("Relu", a), n.g.op("Tanh", b)),
        "Relu is no linear operator",
    ),
    "quantised": (
        lambda n, a, b: n.g.op("Add", quantised(n, a), b),
        "DequantizeLinear is no linear operator",
    ),
    "used-elsewhere": (read_twice, "the result of a branch is used elsewhere as well"),
    "product": (lambda n, a, b: n.g.op("Mul", a, b), None),
    "largest": (lambda n, a, b: n.g.op("Max", a, b), None),
    "side-by-side": (lambda n, a, b: n.g.concat([a, b], 1), None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
@settings(max_examples=5, deadline=None)
@given(one=convolutions(), other=convolutions(), seed=st.integers(0, 2**16))
def test_near_misses_stay_as_they_are(name: str, one: Branch, other: Branch, seed: int) -> None:
    miss, reason = NEAR_MISSES[name]
    network = Network(Builder(), np.random.default_rng(seed), stride=1)
    x = network.g.input("x", [2, CHANNELS, *SIZE])
    model = network.g.model({"y": miss(network, one(network, x), other(network, x))})
    outcome = optimize(model, ["fold-reparam-branches"])
    assert [r.reason for r in outcome.reparam] == ([] if reason is None else [reason])
    assert not outcome.modified
    assert str(outcome.graph) == str(read(model))


@settings(max_examples=10, deadline=None)
@given(one=convolutions(), other=convolutions(), strides=st.permutations([1, 2]), seed=st.integers(0, 2**16))
def test_strided_near_misses_stay_as_they_are(one: Branch, other: Branch, strides: list[int], seed: int) -> None:
    """Two convolutions of which one is coarser, on maps that only have one pixel in the end."""
    g, rng = Builder(), np.random.default_rng(seed)
    x = g.input("x", [2, CHANNELS, 1, 1])
    values = [branch(Network(g, rng, stride), x) for branch, stride in zip((one, other), strides, strict=True)]
    model = g.model({"y": g.op("Add", *values)})
    outcome = optimize(model, ["fold-reparam-branches"])
    assert [r.reason for r in outcome.reparam] == ["the branches have different strides"]
    assert str(outcome.graph) == str(read(model))
