"""fold-reparam-branches: one convolution with the same numbers in float64, and branches that must stay apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from attnrewrite.frontend.onnx import read
from attnrewrite.graph import Graph
from attnrewrite.pipeline import Outcome
from tests.models.onnx_builder import Builder
from tests.passes.rewritten import optimize, written
from tests.running import error, run

SIZE = (7, 11)
CHANNELS = 6


@dataclass(frozen=True)
class Branch:
    """A convolution of x [2, 6, *size]: kernel per axis, centred."""

    kernel: tuple[int, ...]
    bias: bool = True
    groups: int = 1
    dilation: int = 1
    stride: int = 1
    filters: int = CHANNELS

    def weights(self, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(self.filters, CHANNELS // self.groups, *self.kernel))
        return weight, rng.normal(size=self.filters) if self.bias else None

    def write(self, g: Builder, x: str, seed: int, **changes: object) -> str:
        weight, bias = self.weights(seed)
        same = [self.dilation * (k // 2) for k in self.kernel]
        axes = len(self.kernel)
        attributes: dict[str, object] = {
            "pads": same * 2,
            "group": self.groups,
            "strides": [self.stride] * axes,
            "dilations": [self.dilation] * axes,
        }
        operands = [g.constant(weight)] + ([] if bias is None else [g.constant(bias)])
        return g.op("Conv", x, *operands, **attributes | changes)


@dataclass(frozen=True)
class Case:
    """Branches and how they are summed; offsets are constants added beside them."""

    branches: Sequence[Branch]
    total: Callable[[Builder, list[str]], str] = field(default=lambda g, values: nested(g, values))
    size: tuple[int, ...] = SIZE
    offsets: np.ndarray | float = 0.0
    element_type: int = TensorProto.FLOAT
    bound: float = 2e-6  # of max |reference|: sums of up to 6 * 49 terms in float32

    def model(self) -> onnx.ModelProto:
        g = Builder(element_type=self.element_type)
        x = g.input("x", [2, CHANNELS, *self.size])
        return g.model({"y": self.total(g, [b.write(g, x, seed) for seed, b in enumerate(self.branches)])})

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        parts = [convolve(x.astype(np.float64), b, *b.weights(seed)) for seed, b in enumerate(self.branches)]
        return sum(parts[1:], parts[0]) + self.offsets


def nested(g: Builder, values: list[str]) -> str:
    """((a + b) + c) + ..."""
    total = values[0]
    for value in values[1:]:
        total = g.op("Add", total, value)
    return total


def nested_right(g: Builder, values: list[str]) -> str:
    total = values[-1]
    for value in values[-2::-1]:
        total = g.op("Add", value, total)
    return total


def summed(g: Builder, values: list[str]) -> str:
    return g.op("Sum", *values)


OFFSETS = np.linspace(-1, 1, CHANNELS)[:, None, None]


def with_offsets(g: Builder, values: list[str]) -> str:
    return nested(g, [g.add(values[0], OFFSETS), *values[1:]])


def with_scalar(g: Builder, values: list[str]) -> str:
    return nested(g, [values[0], g.constant(0.25), *values[1:]])


def convolve(x: np.ndarray, branch: Branch, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The convolution in float64, tap by tap."""
    axes = len(branch.kernel)
    margin = [branch.dilation * (k // 2) for k in branch.kernel]
    padded = np.pad(x, [(0, 0), (0, 0), *((m, m) for m in margin)])
    size = [-(-e // branch.stride) for e in x.shape[2:]]
    out = np.zeros((len(x), branch.filters, *size))
    inputs, outputs = CHANNELS // branch.groups, branch.filters // branch.groups
    for tap in itertools.product(*map(range, branch.kernel)):
        starts = [t * branch.dilation for t in tap]
        taken = padded[(..., *(slice(s, s + x.shape[2 + a], branch.stride) for a, s in enumerate(starts)))]
        for group in range(branch.groups):
            rows = slice(group * outputs, (group + 1) * outputs)
            part = taken[:, group * inputs : (group + 1) * inputs]
            out[:, rows] += np.moveaxis(np.tensordot(weight[(rows, slice(None), *tap)], part, (1, 1)), 0, 1)
    return out if bias is None else out + bias.reshape(-1, *[1] * axes)


K1, K3, K5 = Branch((1, 1)), Branch((3, 3)), Branch((5, 5))
SHIFT = Branch((3, 3), groups=CHANNELS, filters=3 * CHANNELS)

CASES: dict[str, Case] = {
    "two-of-a-kind": Case([K3, K3]),
    "repvgg-without-identity": Case([K3, K1]),
    "small-kernel-first": Case([K1, K3, K5]),
    "summed-by-sum": Case([K3, K1, K5], summed),
    "nested-right": Case([K3, K1, K5], nested_right),
    "some-without-bias": Case([Branch((3, 3), bias=False), K1]),
    "all-without-bias": Case([Branch((3, 3), bias=False), Branch((1, 1), bias=False)]),
    "rectangular": Case([Branch((1, 5)), Branch((3, 1)), Branch((7, 7))]),
    "depthwise": Case([Branch((3, 3), groups=CHANNELS), Branch((5, 5), groups=CHANNELS)]),
    "deformed-shifting": Case([SHIFT, SHIFT]),
    "grouped": Case([Branch((3, 3), groups=2), Branch((1, 1), groups=2)]),
    "dilated": Case([Branch((3, 3), dilation=2), Branch((5, 5), dilation=2)]),
    "dilated-inside-a-larger": Case([K5, Branch((3, 3), dilation=2), Branch((1, 3), dilation=2)]),
    "dilated-by-multiples": Case([Branch((5, 5), dilation=2), Branch((3, 3), dilation=4)], size=(13, 11)),
    "dilated-beside-pointwise": Case([Branch((3, 3), dilation=2), K1]),
    "strided": Case([Branch((3, 3), stride=2), Branch((1, 1), stride=2)]),
    "one-axis": Case([Branch((3,)), Branch((5,))], size=(13,)),
    "three-axes": Case([Branch((3, 3, 3)), Branch((1, 3, 1))], size=(3, 5, 7)),
    "constant-per-channel": Case([K3, K1], with_offsets, offsets=OFFSETS),
    "scalar": Case([K3, K1], with_scalar, offsets=0.25),
    "half": Case([K3, K1], element_type=TensorProto.FLOAT16, bound=4e-3),
}


def convolutions(graph: Graph) -> int:
    return sum(n.op == "Conv" for n in graph.nodes)


def fold(model: onnx.ModelProto) -> Outcome:
    return optimize(model, ["fold-reparam-branches"])


@pytest.mark.parametrize("name", CASES)
def test_branches_become_one_convolution(name: str) -> None:
    case = CASES[name]
    outcome = fold(case.model())
    (record,) = outcome.reparam
    assert (record.branches, record.into, record.verdict) == (len(case.branches), "Conv", "rewrite")
    assert [n.op for n in outcome.graph.nodes] == ["Conv", "Identity"]
    x = np.random.default_rng(9).normal(size=(2, CHANNELS, *case.size)).astype(outcome.graph.inputs[0].dtype)
    assert error(run(written(outcome), {"x": x})["y"], case.evaluate(x)) <= case.bound


@pytest.mark.parametrize("name", CASES)
def test_folded_weights_are_exact_in_float64(name: str) -> None:
    """Rounded once to the model's type: the nearest numbers to the exact sum of the branches' stored weights."""
    case = CASES[name]
    (conv,) = (n for n in fold(case.model()).graph.nodes if n.op == "Conv")
    kernel = conv.constant(1)
    assert kernel is not None
    exact = np.zeros(kernel.shape)
    for seed, branch in enumerate(case.branches):
        weight = branch.weights(seed)[0].astype(kernel.dtype).astype(np.float64)
        common = conv.attributes["dilations"]
        steps = [branch.dilation // d if k > 1 else 1 for k, d in zip(branch.kernel, common, strict=True)]
        taps = [np.arange(k) * s for k, s in zip(branch.kernel, steps, strict=True)]
        centred = [t + (b - 1 - t[-1]) // 2 for t, b in zip(taps, kernel.shape[2:], strict=True)]
        exact[np.ix_(*map(np.arange, kernel.shape[:2]), *centred)] += weight
    np.testing.assert_array_equal(kernel, exact.astype(kernel.dtype))


@pytest.mark.parametrize("groups", [1, 2, CHANNELS])
@pytest.mark.parametrize("kernels", [[(3, 3)], [(3, 3), (1, 3)]])
def test_the_input_itself_may_be_a_branch(kernels: list[tuple[int, ...]], groups: int) -> None:
    """Also where the input comes from a convolution, which is no branch."""
    branches = [Branch(kernel, groups=groups) for kernel in kernels]
    g = Builder()
    image = g.input("x", [2, CHANNELS, *SIZE])
    data = K1.write(g, image, 7)
    model = g.model({"y": nested(g, [data, *(b.write(g, data, seed) for seed, b in enumerate(branches))])})
    outcome = fold(model)
    (record,) = outcome.reparam
    assert (record.branches, record.verdict) == (len(branches) + 1, "rewrite")
    assert [n.op for n in outcome.graph.nodes] == ["Conv", "Conv", "Identity"]
    x = np.random.default_rng(9).normal(size=(2, CHANNELS, *SIZE)).astype(np.float32)
    made = convolve(x.astype(np.float64), K1, *K1.weights(7))
    expected = sum((convolve(made, b, *b.weights(seed)) for seed, b in enumerate(branches)), made)
    assert error(run(written(outcome), {"x": x})["y"], expected) <= 4e-6  # two sums in a row


def test_the_report_counts_parameters() -> None:
    (record,) = fold(CASES["repvgg-without-identity"].model()).reparam
    assert record.parameters_before == 6 * 6 * 9 + 6 + 6 * 6 + 6
    assert record.parameters_after == 6 * 6 * 9 + 6
    assert record.max_weight_error is not None
    assert 0 < record.max_weight_error < 2**-23 * 8  # half a unit in the last place of numbers below 8


def test_a_value_added_to_itself_counts_twice() -> None:
    g = Builder()
    conv = K3.write(g, g.input("x", [2, CHANNELS, *SIZE]), 0)
    model = g.model({"y": g.op("Add", conv, conv)})
    x = np.random.default_rng(9).normal(size=(2, CHANNELS, *SIZE)).astype(np.float32)
    found = run(written(fold(model)), {"x": x})["y"]
    assert error(found, 2 * convolve(x.astype(np.float64), K3, *K3.weights(0))) <= 2e-6


def test_shared_weights_stay_for_whoever_shares_them() -> None:
    """One weight serves a branch and another convolution elsewhere."""
    g = Builder()
    x = g.input("x", [2, CHANNELS, *SIZE])
    weight = g.constant(K3.weights(0)[0])
    branch = g.op("Conv", x, weight, pads=[1] * 4)
    y = g.op("Add", branch, K1.write(g, x, 1))
    model = g.model({"y": y, "z": g.op("Conv", g.op("Relu", x), weight, pads=[1] * 4)})
    inputs = {"x": np.random.default_rng(9).normal(size=(2, CHANNELS, *SIZE)).astype(np.float32)}
    expected = run(model, inputs)
    outcome = fold(model)
    assert convolutions(outcome.graph) == 2
    found = run(written(outcome), inputs)
    assert error(found["y"], expected["y"]) <= 2e-6
    np.testing.assert_array_equal(found["z"], expected["z"])


NearMiss = Callable[[Builder, str], str]
BOTH = [K3, K1]

# Summands beside two branches, in ONNX and in NumPy: the branches are one convolution, the summand is added as before.
BESIDE: dict[str, tuple[NearMiss, Callable[[np.ndarray], np.ndarray]]] = {
    "activation": (lambda g, x: g.op("Relu", x), lambda x: np.maximum(x, 0)),
    "constant-per-pixel": (lambda g, x: g.constant(PIXELS), lambda x: PIXELS),
    # [11] lines up with the last axis; six channels would not
    "constant-along-the-width": (lambda g, x: g.constant(PIXELS[0]), lambda x: PIXELS[0]),
    "one-channel-of-its-own": (
        lambda g, x: g.op("ReduceMax", x, axes=[1], keepdims=1),
        lambda x: x.max(axis=1, keepdims=True),
    ),
}
PIXELS = np.random.default_rng(3).normal(size=SIZE)


@pytest.mark.parametrize("subtracted", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_other_summands_stay(name: str, subtracted: bool) -> None:
    write, evaluate = BESIDE[name]
    g = Builder()
    data = g.input("x", [2, CHANNELS, *SIZE])
    branches = [b.write(g, data, seed) for seed, b in enumerate(BOTH)]
    beside = write(g, data)
    total = g.op("Sub", branches[0], beside) if subtracted else g.op("Add", beside, branches[0])
    outcome = fold(g.model({"y": g.op("Add", total, branches[1])}))
    (record,) = outcome.reparam
    assert (record.branches, record.verdict) == (2, "rewrite")
    assert convolutions(outcome.graph) == 1
    x = np.random.default_rng(9).normal(size=(2, CHANNELS, *SIZE)).astype(np.float32)
    expected = sum(convolve(x.astype(np.float64), b, *b.weights(seed)) for seed, b in enumerate(BOTH))
    expected = expected - evaluate(x) if subtracted else expected + evaluate(x)
    assert error(run(written(outcome), {"x": x})["y"], expected) <= 2e-6


def test_a_difference_of_branches() -> None:
    g = Builder()
    x = g.input("x", [2, CHANNELS, *SIZE])
    outcome = fold(g.model({"y": g.op("Sub", K1.write(g, x, 0), K3.write(g, x, 1))}))
    assert convolutions(outcome.graph) == 1
    numbers = np.random.default_rng(9).normal(size=(2, CHANNELS, *SIZE)).astype(np.float32)
    wide = numbers.astype(np.float64)
    expected = convolve(wide, K1, *K1.weights(0)) - convolve(wide, K3, *K3.weights(1))
    assert error(run(written(outcome), {"x": numbers})["y"], expected) <= 2e-6


@pytest.mark.parametrize(
    "changes", [{"pads": [2, 1, 0, 1]}, {"auto_pad": "SAME_LOWER", "pads": None}], ids=["off-centre", "padded-by-name"]
)
def test_padding_of_any_kind(changes: dict[str, object]) -> None:
    g = Builder()
    x = g.input("x", [2, CHANNELS, *SIZE])
    model = g.model({"y": g.op("Add", K3.write(g, x, 0), K3.write(g, x, 1, **changes))})
    numbers = {"x": np.random.default_rng(9).normal(size=(2, CHANNELS, *SIZE)).astype(np.float32)}
    outcome = fold(model)
    assert convolutions(outcome.graph) == 1
    assert error(run(written(outcome), numbers)["y"], run(model, numbers)["y"]) <= 4e-6


def test_height_and_width_may_be_symbolic() -> None:
    """The figures of the report are those of numbers, so there are none."""
    g = Builder()
    x = g.input("x", ["batch", CHANNELS, "height", "width"])
    model = g.model({"y": nested(g, [K5.write(g, x, 0), K1.write(g, x, 1), x])})
    outcome = fold(model)
    (record,) = outcome.reparam
    assert (record.branches, record.verdict, record.multiplications_before) == (3, "rewrite", None)
    numbers = {"x": np.random.default_rng(9).normal(size=(2, CHANNELS, *SIZE)).astype(np.float32)}
    assert error(run(written(outcome), numbers)["y"], run(model, numbers)["y"]) <= 4e-6


def test_weights_beyond_the_range_of_their_type_are_not_folded() -> None:
    """Two kernels of 40000 in float16, of which the sum is infinite; their results are not, for small inputs."""
    g = Builder(element_type=TensorProto.FLOAT16)
    x = g.input("x", [2, CHANNELS, *SIZE])
    large = g.constant(np.full((CHANNELS, CHANNELS, 1, 1), 4e4))
    outcome = fold(g.model({"y": g.op("Add", g.op("Conv", x, large), g.op("Conv", x, large))}))
    (record,) = outcome.reparam
    assert (record.verdict, record.reason) == ("leave", "the folded weights are beyond the range of float16")
    assert not outcome.modified


def test_the_report_counts_multiplications_and_units_in_the_last_place() -> None:
    (record,) = fold(CASES["half"].model()).reparam
    pixels = CHANNELS * SIZE[0] * SIZE[1]
    assert record.multiplications_before == pixels * (6 * 9 + 6 + 1)
    assert record.multiplications_after == pixels * 6 * 9
    assert record.max_weight_error_ulp is not None
    assert 0.4 < record.max_weight_error_ulp <= 0.5


def computed_weight(g: Builder, x: str) -> str:
    pooled = g.op("Tanh", g.op("ReduceMean", x, axes=[0, 2, 3], keepdims=1))
    weight = g.op("Mul", pooled, g.constant(np.ones((CHANNELS, 1, 1, 1))))
    return g.op("Add", g.op("Conv", x, weight), K3.write(g, x, 0))


def read_elsewhere(g: Builder, x: str) -> str:
    branch = K3.write(g, x, 0)
    return g.op("Mul", g.op("Add", branch, K1.write(g, x, 1)), branch)


def batch_norm(g: Builder, x: str) -> str:
    statistics = np.random.default_rng(5).uniform(0.5, 1.5, (4, CHANNELS))
    return g.op("BatchNormalization", x, *map(g.constant, statistics))


def of_two(**changes: object) -> NearMiss:
    return lambda g, x: g.op("Add", K3.write(g, x, 0), K3.write(g, x, 1, **changes))


NEAR_MISSES: dict[str, tuple[NearMiss, str]] = {
    "other-stride": (
        lambda g, x: g.op("Add", Branch((3, 3), stride=11).write(g, x, 0), Branch((1, 1), stride=12).write(g, x, 1)),
        "the branches have different strides",
    ),
    "other-dilation": (
        of_two(dilations=[2, 2], pads=[2, 2, 2, 2]),
        f"one operator would take {462 * 6 * 25:,} multiplications for a sample, now it is {462 * 109:,}",
    ),
    "computed-weight": (computed_weight, "a branch computes its weights"),
    "read-elsewhere": (read_elsewhere, "the result of a branch is used elsewhere as well"),
    "input-of-another-shape": (  # one filter for six channels, broadcast by the sum
        lambda g, x: g.op("Add", Branch((3, 3), filters=1).write(g, x, 0), x),
        "a branch does not have the shape of the sum",
    ),
    "norm-before-padding": (
        lambda g, x: K3.write(g, batch_norm(g, x), 0),
        "zero padding after a bias",
    ),
    "depthwise-then-dense": (
        lambda g, x: K1.write(g, Branch((3, 3), groups=CHANNELS).write(g, x, 0), 1),
        f"one operator would take {462 * 6 * 9:,} multiplications for a sample, now it is {462 * (9 + 6):,}",
    ),
    "both-padded": (
        lambda g, x: K3.write(g, Branch((3, 3), bias=False).write(g, x, 0), 1),
        "zero padding after a kernel that reaches beyond it",
    ),
    "relu-between": (
        lambda g, x: g.op("Add", K3.write(g, x, 0), g.op("Relu", K1.write(g, x, 1))),
        "Relu is no linear operator",
    ),
}


def near_miss(write: NearMiss) -> onnx.ModelProto:
    g = Builder()
    return g.model({"y": write(g, g.input("x", [2, CHANNELS, *SIZE]))})


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name: str) -> None:
    write, reason = NEAR_MISSES[name]
    outcome = fold(near_miss(write))
    (record,) = outcome.reparam
    assert (record.verdict, record.reason) == ("leave", reason)
    assert record.node
    assert not outcome.modified


SILENT: dict[str, NearMiss] = {
    "other-input": lambda g, x: g.op("Add", K3.write(g, x, 0), K1.write(g, g.op("Relu", x), 1)),
    # as many multiplications as one 2 x 2 convolution, but that has four times the weights
    "mean-behind-a-pointwise-convolution": lambda g, x: g.op(
        "AveragePool", K1.write(g, x, 0), kernel_shape=[2, 2], strides=[2, 2]
    ),
    "norm-behind-an-activation": lambda g, x: g.op("Relu", batch_norm(g, g.op("Relu", x))),
    "one-branch": lambda g, x: g.op("Add", K3.write(g, x, 0), g.op("Relu", x)),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_are_no_branches_is_not_spoken_of(name: str) -> None:
    outcome = fold(near_miss(SILENT[name]))
    assert (outcome.reparam, outcome.modified) == ((), False)
    assert str(outcome.graph) == str(read(near_miss(SILENT[name])))
