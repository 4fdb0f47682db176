"""Every line of the table from ONNX operators to torch functions against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from attnrewrite import ops  # noqa: E402
from attnrewrite.frontend.evaluate import run_in_onnxruntime  # noqa: E402
from attnrewrite.frontend.fx.emit import TABLE, run_graph, run_node  # noqa: E402
from attnrewrite.frontend.fx.entry import NotInTorch  # noqa: E402
from attnrewrite.functions import body_of, operands_of  # noqa: E402
from attnrewrite.graph import Graph, Node, Value  # noqa: E402
from attnrewrite.indexing.rules import RULES  # noqa: E402
from tests.functions import test_bodies, test_predicted_weights  # noqa: E402
from tests.running import error, run  # noqa: E402

RNG = np.random.default_rng(0)
FLOAT32 = 4e-6  # of max |reference|: sums of up to 200 products, and functions rounded to one or two units


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return RNG.uniform(0.1, 3.0, shape).astype(np.float32)


def ints(*elements: int) -> np.ndarray:
    return np.array(elements, np.int64)


def scalar(element: float) -> np.ndarray:
    return np.array(element, np.float32)


def bools(*shape: int) -> np.ndarray:
    return RNG.integers(0, 2, shape).astype(bool)


@dataclass(frozen=True)
class Case:
    """A node; inputs after the first `given` are constants. opset: where it is not 17."""

    op: str
    inputs: tuple[np.ndarray | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    given: int = 1
    outputs: int = 1
    opset: int = 17


def one(op: str, *inputs: np.ndarray | None, given: int = 1, outputs: int = 1, opset: int = 17, **more: Any) -> Case:
    return Case(op, inputs, more, given, outputs, opset)


X, Y = normal(2, 3, 5), normal(2, 3, 5)
MAP = normal(2, 4, 7, 6)
INTS = RNG.integers(-9, 9, (3, 5))
DIVISORS = np.where(INTS.T.reshape(3, 5) == 0, 2, INTS.T.reshape(3, 5))

CASES: dict[str, Case] = {
    **{
        op.lower(): one(op, X)
        for op in ("Abs", "Ceil", "Celu", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish", "Identity",
                   "LeakyRelu", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus",
                   "Softsign", "Tanh", "ThresholdedRelu", "Asinh", "Atan", "Cosh", "Sinh", "Tan", "IsNaN", "IsInf",
                   "Transpose", "Flatten", "Dropout", "Softmax", "LogSoftmax", "LpNormalization")
    },
    **{op.lower(): one(op, positive(3, 4)) for op in ("Log", "Sqrt")},
    **{op.lower(): one(op, np.tanh(X)) for op in ("Acos", "Asin", "Atanh")},
    "acosh": one("Acosh", 1 + positive(3, 4)),
    "mish": one("Mish", X, opset=18),
    "gelu": one("Gelu", X, opset=20),
    "gelu by tanh": one("Gelu", X, opset=20, approximate="tanh"),
    "swish": one("Swish", X, opset=24),
    "swish of a slope": one("Swish", X, opset=24, alpha=1.7),
    "celu of alpha": one("Celu", X, alpha=0.3),
    "elu of alpha": one("Elu", X, alpha=0.3),
    "selu of both": one("Selu", X, alpha=1.3, gamma=0.7),
    "leaky relu of alpha": one("LeakyRelu", X, alpha=0.3),
    "thresholded relu of alpha": one("ThresholdedRelu", X, alpha=0.3),
    "hard sigmoid of both": one("HardSigmoid", X, alpha=0.3, beta=0.4),
    "softplus far out": one("Softplus", normal(4) * 100),
    "round half to even": one("Round", np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)),
    "cast to int": one("Cast", X * 5, to=7),
    "cast to half": one("Cast", X, to=10),
    "cast to bool": one("Cast", np.array([0, 0.3, -2], np.float32), to=9),
    "clip": one("Clip", X, scalar(-0.5), scalar(0.7)),
    "clip below": one("Clip", X, scalar(-0.5)),
    "clip above": one("Clip", X, None, scalar(0.5)),
    "clip by tensors": one("Clip", X, scalar(-0.5), scalar(0.7), given=3),
    "clip by one tensor": one("Clip", X, scalar(-0.5), scalar(0.7), given=2),
    **{op.lower(): one(op, X, normal(3, 1), given=2) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")},
    **{f"{op.lower()} of a number": one(op, X, scalar(0.3)) for op in ("Add", "Sub", "Mul", "Div", "Equal", "PRelu")},
    **{f"{op.lower()} to a number": one(op, scalar(0.3), X, given=0) for op in ("Add", "Sub", "Mul", "Div")},
    "a number that adds axes": one("Mul", normal(3), normal(1, 1, 1, 1)),
    "max of three": one("Max", X, Y, normal(5), given=3),
    "mean of three": one("Mean", X, Y, normal(5), given=3),
    "pow": one("Pow", positive(3, 4), normal(3, 4), given=2),
    "pow of an integer": one("Pow", X, np.array(2, np.int64)),
    "square": one("Pow", X, scalar(2.0)),
    "an integer to a float": one("Pow", INTS, scalar(2.0)),
    "prelu": one("PRelu", X, normal(3, 1)),
    "integer division": one("Div", INTS, DIVISORS, given=2),
    "integer division by a number": one("Div", INTS, np.array(4)),
    "mod": one("Mod", INTS, DIVISORS, given=2),
    "fmod": one("Mod", X, Y, given=2, fmod=1),
    "mod of a number": one("Mod", INTS, np.array(4)),
    **{
        op.lower(): one(op, INTS, DIVISORS, given=2)
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    },
    **{f"{op.lower()} a number": one(op, INTS, np.array(2)) for op in ("Greater", "Less", "LessOrEqual")},
    "not": one("Not", bools(3, 4)),
    **{op.lower(): one(op, bools(3, 4), bools(4), given=2) for op in ("And", "Or", "Xor")},
    "positive infinity": one("IsInf", np.array([1, np.inf, -np.inf], np.float32), detect_negative=0),
    "negative infinity": one("IsInf", np.array([1, np.inf, -np.inf], np.float32), detect_positive=0),
    "one hot": one("OneHot", ints(0, 2, -1, 7), ints(4), np.array([0.5, 2], np.float32)),
    "one hot in front": one("OneHot", ints(0, 2, -1), ints(4), np.array([0.5, 2], np.float32), axis=0),
    "where": one("Where", bools(3, 1), X, Y, given=3),
    "where a number": one("Where", bools(3, 1), scalar(-9), Y, given=1),
    "where not a number": one("Where", bools(2, 3, 5), X, scalar(-np.inf), given=2),
    "where two numbers": one("Where", bools(2, 3, 5), scalar(2), scalar(-np.inf)),
    "reshape": one("Reshape", X, ints(0, -1)),
    "reshape to nothing": one("Reshape", normal(0, 3), ints(3, 0), allowzero=1),
    "flatten at 2": one("Flatten", MAP, axis=2),
    "flatten at the end": one("Flatten", MAP, axis=-1),
    "flatten at 0": one("Flatten", MAP, axis=0),
    "squeeze": one("Squeeze", normal(1, 3, 1, 5), ints(-2)),
    "squeeze all": one("Squeeze", normal(1, 3, 1, 5)),
    "unsqueeze": one("Unsqueeze", X, ints(3, 0, -2)),
    "transpose by perm": one("Transpose", MAP, perm=[2, 0, 3, 1]),
    "slice": one("Slice", MAP, ints(1, -5), ints(2**63 - 1, -1), ints(3, 2), ints(2, 1)),
    "slice without axes": one("Slice", MAP, ints(1, 0, -99), ints(99, 3, 4)),
    "slice backwards": one("Slice", MAP, ints(-1, 4), ints(-(2**63) + 1, 0), ints(3, 2), ints(-1, -2)),
    "slice of nothing": one("Slice", MAP, ints(5), ints(2), ints(2)),
    "slice backwards of nothing": one("Slice", MAP, ints(1), ints(4), ints(2), ints(-1)),
    "split": one("Split", MAP, ints(1, 4, 2), axis=2, outputs=3),
    "split in equal parts": one("Split", MAP, axis=1, outputs=2),
    "split with a rest": one("Split", MAP, axis=2, outputs=3, opset=18, num_outputs=3),
    "concat": one("Concat", X, normal(2, 1, 5), given=2, axis=-2),
    "pad": one("Pad", MAP, ints(0, 1, 2, 0, 0, 0, 1, 3), scalar(7.5)),
    "pad by default": one("Pad", MAP, ints(0, 1, 2, 0, 0, 0, 1, 3)),
    "crop by pads": one("Pad", MAP, ints(0, -1, 2, 0, 0, 0, -2, 3)),
    "pad some axes": one("Pad", MAP, ints(1, 2, 3, 4), None, ints(-1, 1), opset=18),
    "pad an edge": one("Pad", MAP, ints(0, 0, 2, 3, 0, 0, 1, 4), mode="edge"),
    "pad by reflection": one("Pad", MAP, ints(0, 0, 2, 3, 0, 0, 1, 4), mode="reflect"),
    "pad around": one("Pad", MAP, ints(0, 0, 2, 3, 0, 0, 1, 4), mode="wrap", opset=19),
    "expand": one("Expand", normal(3, 1), ints(2, 1, 4)),
    "expand to fewer axes": one("Expand", X, ints(3, 1)),
    "tile": one("Tile", X, ints(2, 1, 3)),
    "gather": one("Gather", MAP, ints(3, 0, -1), axis=2),
    "gather a matrix": one("Gather", MAP, np.array([[0, 2], [-1, 1]]), axis=1),
    "gather one": one("Gather", MAP, np.array(-2), axis=3),
    "gather by a tensor": one("Gather", MAP, np.array([[0, 2], [-1, 1]]), given=2, axis=1),
    "gather nd": one("GatherND", MAP, np.array([[0, 1], [1, -1]])),
    "gather nd in batches": one("GatherND", MAP, np.array([[[0, 1], [1, 2]], [[3, 3], [2, 0]]]), given=2, batch_dims=1),
    "gather elements": one("GatherElements", MAP, RNG.integers(-7, 7, (2, 4, 3, 6)), axis=2),
    "scatter elements": one(
        "ScatterElements", normal(4, 5), np.array([[1, -1, 3], [0, 2, 4]]), normal(2, 3), axis=1, given=3
    ),
    "scatter elements and add": one(
        "ScatterElements", normal(4, 5), np.array([[1, 1], [0, -1]]), normal(2, 2), axis=0, opset=18, reduction="add"
    ),
    "scatter nd": one("ScatterND", normal(4, 5), np.array([[1], [-1]]), normal(2, 5), given=3),
    "scatter nd and add": one("ScatterND", normal(4, 5), np.array([[1], [1]]), normal(2, 5), opset=18, reduction="add"),
    "space to depth": one("SpaceToDepth", normal(2, 3, 4, 6), blocksize=2),
    "depth to space": one("DepthToSpace", normal(2, 12, 3, 5), blocksize=2),
    "depth to space by columns": one("DepthToSpace", normal(2, 12, 3, 5), blocksize=2, mode="CRD"),
    "overlap-add": one("Col2Im", normal(2, 3 * 4, 20), ints(5, 6), ints(2, 2), opset=18),
    "overlap-add with everything": one(
        "Col2Im", normal(2, 3 * 6, 30), ints(9, 11), ints(2, 3), opset=18, strides=[2, 2], pads=[1, 1, 2, 0],
        dilations=[1, 1],
    ),
    "range": one("Range", np.array(1), np.array(9), np.array(3), given=0),
    "constant of shape": one("ConstantOfShape", ints(2, 3), given=0, value=np.array([7], np.int64)),
    "constant of shape by default": one("ConstantOfShape", ints(2, 3), given=0),
    "trilu": one("Trilu", normal(2, 4, 5), np.array(1)),
    "lower trilu": one("Trilu", normal(2, 4, 5), upper=0),
    "matmul": one("MatMul", normal(2, 1, 3, 4), normal(5, 4, 6), given=2),
    "matmul of vectors": one("MatMul", normal(4), normal(5, 4, 6), given=2),
    "gemm": one("Gemm", normal(3, 4), normal(4, 5), normal(5)),
    "gemm of a Linear": one("Gemm", normal(3, 4), normal(5, 4), normal(5), transB=1),
    "gemm with everything": one(
        "Gemm", normal(4, 3), normal(5, 4), normal(3, 1), transA=1, transB=1, alpha=0.3, beta=2.0
    ),
    "gemm without a bias": one("Gemm", normal(4, 3), normal(4, 5), transA=1, alpha=0.3),
    "einsum": one("Einsum", X, normal(2, 4, 5), given=2, equation="bic,bjc->bij"),
    "conv": one("Conv", MAP, normal(6, 2, 3, 3), normal(6), group=2, pads=[1, 0, 1, 0], strides=[2, 1]),
    "conv with uneven pads": one("Conv", MAP, normal(6, 4, 3, 2), pads=[1, 0, 2, 1], dilations=[2, 1]),
    "conv same upper": one("Conv", MAP, normal(6, 4, 3, 2), auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv same lower": one("Conv", MAP, normal(6, 4, 3, 2), auto_pad="SAME_LOWER"),
    "conv valid": one("Conv", MAP, normal(6, 4, 3, 2), auto_pad="VALID"),
    "conv of one axis": one("Conv", X, normal(4, 3, 2), normal(4)),
    "transposed conv": one("ConvTranspose", MAP, normal(4, 3, 3, 3), normal(6), group=2, strides=[2, 2]),
    "transposed conv with pads": one(
        "ConvTranspose", MAP, normal(4, 3, 3, 3), strides=[2, 3], pads=[1, 1, 1, 1], output_padding=[1, 2]
    ),
    "transposed conv with uneven pads": one("ConvTranspose", MAP, normal(4, 3, 3, 3), pads=[1, 0, 0, 2]),
    "transposed conv of a size": one(
        "ConvTranspose", MAP, normal(4, 3, 3, 3), strides=[2, 2], output_shape=[14, 13], auto_pad="SAME_UPPER"
    ),
    "softmax of an axis": one("Softmax", MAP, axis=1),
    "layer norm": one("LayerNormalization", X, normal(5), normal(5)),
    "layer norm of two axes": one("LayerNormalization", X, normal(3, 5), normal(3, 5), axis=1, epsilon=0.3),
    "layer norm with its statistics": one("LayerNormalization", X, normal(5), normal(5), outputs=3),
    "layer norm without a bias": one("LayerNormalization", X, normal(5)),
    "rms norm": one("RMSNormalization", X, normal(5), opset=23, epsilon=0.01),
    "lp norm of an axis": one("LpNormalization", X, axis=1, p=1),
    "lp norm of zeros": one("LpNormalization", np.zeros((2, 3), np.float32)),
    "batch norm": one("BatchNormalization", MAP, normal(4), normal(4), normal(4), positive(4), epsilon=1e-3),
    "instance norm": one("InstanceNormalization", MAP, normal(4), normal(4)),
    "group norm": one("GroupNormalization", MAP, normal(4), normal(4), num_groups=2, opset=21),
    "group norm of groups": one("GroupNormalization", MAP, normal(2), normal(2), num_groups=2, opset=18),
    **{
        op.lower(): one(op, positive(2, 3, 5), axes=[-1, 0])
        for op in ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare",
                   "ReduceLogSum", "ReduceLogSumExp")
    },
    "reduce by an operand": one("ReduceSum", X, ints(1), keepdims=0),
    "reduce all": one("ReduceSum", X, keepdims=0),
    "reduce nothing": one("ReduceSum", X, noop_with_empty_axes=1),
    "mean by an operand": one("ReduceMean", X, ints(1, 2), opset=18),
    "sum of integers": one("ReduceSum", INTS.astype(np.int32), ints(1)),
    "cumulative sum": one("CumSum", X, np.array(1)),
    "cumulative sum, both": one("CumSum", X, np.array(-1), exclusive=1, reverse=1),
    "argmax": one("ArgMax", X, axis=1),
    "last argmin": one("ArgMin", np.array([[1, 0, 2, 0]], np.float32), axis=1, select_last_index=1, keepdims=0),
    "top k": one("TopK", X, ints(2), outputs=2),
    "max pool": one("MaxPool", MAP, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1]),
    "max pool rounded up": one("MaxPool", MAP, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "average pool": one("AveragePool", MAP, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 0]),
    "average pool with pads": one("AveragePool", X, kernel_shape=[3], pads=[1, 1], count_include_pad=1),
    "global average pool": one("GlobalAveragePool", MAP),
    "global max pool": one("GlobalMaxPool", MAP),
}  # fmt: skip


def node_of(case: Case) -> Node:
    values = [
        None if array is None else Value(f"i{k}", array.shape, array.dtype, array if k >= case.given else None)
        for k, array in enumerate(case.inputs)
    ]
    return Node(case.op, values, [Value(f"o{k}") for k in range(case.outputs)], dict(case.attributes))


def given(case: Case) -> list[Any]:
    return [None if a is None or k >= case.given else torch.from_numpy(a.copy()) for k, a in enumerate(case.inputs)]


@pytest.mark.parametrize("name", CASES)
def test_entry_computes_what_onnx_runtime_computes(name: str) -> None:
    case = CASES[name]
    node = node_of(case)
    expected = run_in_onnxruntime(node, list(case.inputs), case.opset)
    found = run_node(node, given(case))
    assert len(found) == len(expected)
    for want, have in zip(expected, found, strict=True):
        array = have.numpy()
        assert (array.dtype, array.shape) == (want.dtype, want.shape)
        if want.dtype.kind != "f" or not want.size:
            np.testing.assert_array_equal(array, want)
        else:
            finite = want[np.isfinite(want)]
            np.testing.assert_allclose(array, want, rtol=0, atol=FLOAT32 * max(np.abs(finite).max(initial=1), 1))


def test_every_operator_of_the_vocabulary_has_an_entry_and_every_entry_a_case() -> None:
    assert ops.POINTWISE | ops.REDUCTIONS | ops.NORMALISATIONS | set(RULES) <= set(TABLE)
    assert set(TABLE) == {case.op for case in CASES.values()}


def test_entries_run_on_fake_tensors_of_symbolic_batch() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    fake = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC])
    x = Value("x", ("B", 3, 4), np.dtype(np.float32))  # type: ignore[arg-type]
    shape, first, target, y = (Value(n) for n in ("shape", "first", "target", "y"))
    rest = Value("rest", (2,), np.dtype(np.int64), ints(2, 6))
    bounds = [Value(n, (1,), np.dtype(np.int64), ints(n_)) for n, n_ in (("start", 0), ("end", 1))]
    graph = Graph(
        [x],
        [y, first],
        [
            Node("Shape", [x], [shape]),
            Node("Slice", [shape, *bounds], [first]),
            Node("Concat", [first, rest], [target], {"axis": 0}),
            Node("Reshape", [x, target], [y]),
        ],
        17,
    )
    batched = fake.from_tensor(torch.zeros(5, 3, 4), symbolic_context=context)
    with fake:
        made, size = run_graph(graph, [batched])
    assert isinstance(made.shape[0], torch.SymInt)
    assert made.shape[1:] == (2, 6)
    assert size.shape == (1,)
    concrete, size = run_graph(graph, [torch.zeros(5, 3, 4)])
    assert (tuple(concrete.shape), size.tolist()) == ((5, 2, 6), [5])


def test_gradients_flow_through_entries() -> None:
    node = node_of(one("Gemm", normal(3, 4), normal(5, 4), normal(5), transB=1, given=3))
    operands = [torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (5, 4), (5,))]
    run_node(node, operands)[0].square().sum().backward()
    assert all(operand.grad is not None and operand.grad.abs().sum() > 0 for operand in operands)


def test_constants_of_bfloat16() -> None:
    table = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    x = Value("x", (3, 2), table.dtype)
    node = Node("Mul", [x, Value("c", (2,), table.dtype, table)], [Value("y")])
    found = run_node(node, [torch.ones(3, 2, dtype=torch.bfloat16), None])[0]
    assert found.dtype == torch.bfloat16 and found[0].tolist() == [1.5, -2.0]


def test_what_the_table_lacks_is_named() -> None:
    with pytest.raises(NotInTorch, match="no torch function is known for GridSample"):
        run_node(Node("GridSample", [Value("x", (1,))], [Value("y")], name=""), [torch.zeros(1)])
    with pytest.raises(NotInTorch, match="BatchNormalization in training mode"):
        case = one("BatchNormalization", MAP, *[positive(4)] * 4, training_mode=1)
        run_node(node_of(case), given(case))


BODIES: dict[str, test_bodies.Case | test_predicted_weights.Case] = {
    **{name: case for name, case in test_bodies.CASES.items() if case.dtype is np.float32},
    **{f"predicted {name}": case for name, case in test_predicted_weights.CASES.items()},
}


@pytest.mark.parametrize("name", BODIES)
def test_every_body_of_the_two_ops_runs(name: str) -> None:
    case = BODIES[name]
    operands = case.operands()
    values = [Value(n, operands[n].shape, operands[n].dtype) if n in operands else None for n in case.spec.operands]
    outputs = [Value("y"), Value("extra")] if "extra_query" in operands else [Value("y")]
    node = Node(case.spec.op_type, values, outputs, case.spec.attributes(), domain="attnrewrite")
    named = operands_of(node)
    found = run_graph(body_of(node, 17), [torch.from_numpy(operands[n]) for n in named])
    for have, want in zip(found, run(case.model(), operands).values(), strict=True):
        assert error(have.numpy(), want) <= 2e-6
