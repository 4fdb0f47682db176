"""Small ONNX models built by hand, for tests of what surrounds the rewriting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17


def save(path: Path, model: onnx.ModelProto) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, Sequence[int | str]]],
    outputs: dict[str, tuple[int, Sequence[int | str]]],
    weights: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def linear(
    batch: int | str = 1,
    tokens: int = 6,
    channels: int = 8,
    *,
    factor: float = 1.0,
    shift_by: int = 0,
    dtype: type = np.float32,
) -> onnx.ModelProto:
    """y = x @ weight + bias, x [batch, tokens, channels]; factor scales the output, shift_by rolls its channels."""
    rng = np.random.default_rng(7)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = rng.standard_normal((channels, channels)).astype(dtype)
    weights = {"weight": np.roll(weight * dtype(factor), shift_by, axis=1), "bias": np.zeros(channels, dtype)}
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], name="linear"),
        helper.make_node("Add", ["product", "bias"], ["y"], name="bias"),
    ]
    shape = [batch, tokens, channels]
    return model_of(nodes, {"x": (kind, shape)}, {"y": (kind, shape)}, weights)


def global_attention(batch: int | str = 1, tokens: int = 16, channels: int = 8, seed: int = 3) -> onnx.ModelProto:
    """One-headed attention over all tokens of x [batch, tokens, channels]: one softmax, nothing local about it."""
    rng = np.random.default_rng(seed)
    weights = {
        name: (rng.standard_normal((channels, channels)) * channels**-0.5).astype(np.float32)
        for name in ("wq", "wk", "wv")
    }
    weights["scale"] = np.array(channels**-0.5, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"], name="query"),
        helper.make_node("MatMul", ["x", "wk"], ["k"], name="key"),
        helper.make_node("MatMul", ["x", "wv"], ["v"], name="value"),
        helper.make_node("Transpose", ["k"], ["kt"], name="transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["raw"], name="logits"),
        helper.make_node("Mul", ["raw", "scale"], ["logits"], name="scaled"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["probabilities", "v"], ["y"], name="attended"),
    ]
    shape = [batch, tokens, channels]
    return model_of(nodes, {"x": (TensorProto.FLOAT, shape)}, {"y": (TensorProto.FLOAT, shape)}, weights)


def embedding(vocabulary: int = 11, tokens: int = 5, channels: int = 4) -> onnx.ModelProto:
    """y = table[ids]: an integer input that must stay below the vocabulary."""
    table = np.random.default_rng(1).standard_normal((vocabulary, channels)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], name="embed")]
    return model_of(
        nodes,
        {"ids": (TensorProto.INT64, ["batch", tokens])},
        {"y": (TensorProto.FLOAT, ["batch", tokens, channels])},
        {"table": table},
    )


def one_off(model: onnx.ModelProto, by: float) -> onnx.ModelProto:
    """The same model with `by` added to one element of its first output."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    output = changed.graph.output[0]
    shape = [d.dim_value or 1 for d in output.type.tensor_type.shape.dim]
    spot = np.zeros(shape, np.float32)
    spot.flat[spot.size // 2] = by
    changed.graph.node[-1].output[0] = "before"
    changed.graph.initializer.append(numpy_helper.from_array(spot, "spot"))
    changed.graph.node.append(helper.make_node("Add", ["before", "spot"], [output.name], name="off"))
    return changed
