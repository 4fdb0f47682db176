"""Small models compiled in this process and run beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from attnrewrite.lowering import build, importer
from attnrewrite.lowering.compile import CompileReport, compile_model
from attnrewrite.lowering.split_linear import split_linear
from attnrewrite.lowering.targets import parse_target

Shape = Sequence[int | str]

_TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: type = np.float32,
    opset: int = 18,
) -> onnx.ModelProto:
    """A model whose one output is the last node's, of the inputs' dtype."""
    kind = _TYPES[np.dtype(dtype)]
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    """`inputs` are names separated by blanks; `-` stands for a missing one."""
    return helper.make_node(op, ["" if i == "-" else i for i in inputs.split()], [output], **attributes)


def normal(*shape: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def compiled(proto: onnx.ModelProto, precision: str = "fp32"):  # type: ignore[no-untyped-def]
    """The model's function on this CPU: arrays in, first output out."""
    import tvm
    from tvm import relax

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    split_linear(copy)
    target = parse_target("cpu")
    description = build.tvm_target(target)
    executable = build.build(
        importer.import_onnx(copy, target, description), description, precision=precision
    ).executable
    function = relax.VirtualMachine(executable, tvm.cpu())["main"]

    def run(*arrays: np.ndarray) -> np.ndarray:
        result = function(*(tvm.runtime.tensor(a) for a in arrays))
        return (result if hasattr(result, "numpy") else result[0]).numpy()

    return run


def reference(proto: onnx.ModelProto, *arrays: np.ndarray) -> np.ndarray:
    """ONNX Runtime's first output."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, arrays, strict=True)))[0])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """max |found - expected| / max |expected|, infinite where shapes differ or one is not finite where the other is."""
    if found.shape != expected.shape or not np.array_equal(np.isfinite(found), np.isfinite(expected)):
        return float("inf")
    finite = np.isfinite(expected)
    found64, expected64 = found[finite].astype(np.float64), expected[finite].astype(np.float64)
    return float(np.abs(found64 - expected64).max() / np.abs(expected64).max())


def artifact(proto: onnx.ModelProto, directory: Path, target: str, **options: object) -> CompileReport:
    """An artifact directory made by the child process."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "source.onnx"
    onnx.save(proto, path)
    return compile_model(path, parse_target(target), directory, **options)  # type: ignore[arg-type]


def small_network(batch: int | str = 1) -> onnx.ModelProto:
    """A convolution, a linear layer with GELU, a normalisation and a softmax: every kind of schedule once."""
    nodes = [
        node("Conv", "x w0 b0", "c", strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        node("Transpose", "c", "t", perm=[0, 2, 3, 1]),
        node("LayerNormalization", "t g b", "n", axis=-1, epsilon=1e-5),
        node("MatMul", "n w1", "m"),
        node("Add", "m b1", "a"),
        node("Div", "a root", "d"),
        node("Erf", "d", "e"),
        node("Add", "e one", "o"),
        node("Mul", "a o", "h"),
        node("Softmax", "h", "y", axis=-1),
    ]
    weights = {
        "w0": normal(12, 3, 3, 3),
        "b0": normal(12),
        "g": normal(12, seed=1),
        "b": normal(12, seed=2),
        "w1": normal(12, 19),
        "b1": normal(19),
        "root": np.array(2.0**0.5, np.float32),
        "one": np.array(1.0, np.float32),
    }
    return model(nodes, {"x": [batch, 3, 13, 10]}, weights)
