"""The two ops as nodes of a model: imported, given their kernels, run at several batches from one compilation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.functions.spec import DOMAIN, FlashWindowAttention, SlideAttention, Spec
from attnrewrite.localattention.geometry import KeyWindows, NeighborhoodGeometry, WindowGeometry
from attnrewrite.lowering.kernels import reference
from attnrewrite.lowering.kernels.coverage import covers
from attnrewrite.lowering.written_out import write_out
from tests.lowering.compiling import compiled, node, normal, relative_error

HEADS, HEAD_DIM = 3, 6
CHANNELS = HEADS * HEAD_DIM

WINDOW = FlashWindowAttention(WindowGeometry((11, 9), (4, 3), (2, 1), True), HEADS, HEAD_DIM**-0.5, -100.0)
SLIDE = SlideAttention(NeighborhoodGeometry((9, 11), (3, 3), (1, 1)), HEADS, HEAD_DIM**-0.5)


def _bordered(border: str, **more: Any) -> SlideAttention:
    return SlideAttention(NeighborhoodGeometry((9, 11), (3, 3), (1, 2), border, **more), HEADS, HEAD_DIM**-0.5)


# What no kernel computes: lowered as standard operators.
WRITTEN_OUT = {
    "exclude": _bordered("exclude"),
    "inward": _bordered("inward"),
    "wrap": _bordered("wrap"),
    "off-centre": _bordered("zero", offset=(0, -2)),
}


def network(spec: Spec, batch: int | str) -> onnx.ModelProto:
    """Two sites of the same geometry, one after the other; bias given, the optional operands before it missing."""
    size = [*spec.geometry.feature_size]
    shape = [batch, *size, CHANNELS] if isinstance(spec, FlashWindowAttention) else [batch, CHANNELS, *size]
    sites = [
        helper.make_node(spec.op_type, ["x", "x", "x", "bias"], ["a"], domain=DOMAIN, **spec.attributes()),
        helper.make_node(spec.op_type, ["a", "x", "a", "bias"], ["b"], domain=DOMAIN, **spec.attributes()),
    ]
    graph = helper.make_graph(
        [*sites, node("Add", "b x", "y")],
        "sites",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(bias_of(spec), "bias")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def bias_of(spec: Spec) -> np.ndarray:
    if isinstance(spec, FlashWindowAttention):
        tokens = spec.geometry.tokens_per_window
        return normal(1, HEADS, tokens, tokens)
    return normal(HEADS, spec.geometry.keys_per_query)


def expected(spec: Spec, x: np.ndarray) -> np.ndarray:
    attend = reference.flash_window_attention if isinstance(spec, FlashWindowAttention) else reference.slide_attention
    operands = {"query": x, "key": x, "value": x, "bias": bias_of(spec)}
    first = attend(spec, operands)
    return attend(spec, {**operands, "query": first, "value": first}) + x


@pytest.mark.parametrize("spec", [WINDOW, SLIDE], ids=["window", "slide"])
def test_one_compilation_for_every_batch(spec: Spec) -> None:
    run = compiled(network(spec, "batch"))
    size = [*spec.geometry.feature_size]
    for batch in (1, 2, 5):
        shape = (batch, *size, CHANNELS) if spec is WINDOW else (batch, CHANNELS, *size)
        x = normal(*shape)
        # Two softmaxes over float32 logits of about 5: a few units in the last place each.
        assert relative_error(run(x), expected(spec, x)) <= 5e-6


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_what_no_kernel_covers_is_lowered_as_its_body(name: str) -> None:
    model = to_model(read(network(WRITTEN_OUT[name], "batch")))
    write_out(model, covers)
    assert not any(node.domain == DOMAIN for node in model.graph.node)
    run = compiled(model)
    for batch in (1, 2):
        x = normal(batch, CHANNELS, 9, 11)
        assert relative_error(run(x), expected(WRITTEN_OUT[name], x)) <= 5e-6


def test_a_computed_bias_is_laid_out_when_the_model_runs() -> None:
    model = network(WINDOW, "batch")
    weights = bias_of(WINDOW)
    del model.graph.initializer[:]
    model.graph.input.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, weights.shape))
    x = normal(2, *WINDOW.geometry.feature_size, CHANNELS)
    assert relative_error(compiled(model)(x, weights), expected(WINDOW, x)) <= 5e-6


def test_keys_of_a_map_of_another_size() -> None:
    keys = KeyWindows((22, 18), (10, 6), (8, 6), (-1, 0), (1, 1))
    spec = FlashWindowAttention(WindowGeometry((11, 9), (4, 3), (2, 1), True, keys), HEADS, HEAD_DIM**-0.5)
    site = helper.make_node(spec.op_type, ["x", "y", "y"], ["z"], domain=DOMAIN, **spec.attributes())
    shapes = {"x": ["batch", 11, 9, CHANNELS], "y": ["batch", 22, 18, CHANNELS]}
    kind = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([site], "site", inputs, [helper.make_tensor_value_info("z", kind, None)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    run = compiled(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    x, y = normal(2, 11, 9, CHANNELS), normal(2, 22, 18, CHANNELS)
    wanted = reference.flash_window_attention(spec, {"query": x, "key": y, "value": y})
    assert relative_error(run(x, y), wanted) <= 5e-6


@pytest.mark.parametrize("rows", [4 * 4 + 3 * 3, 12 * 12], ids=["per axis", "per pair"])
def test_tables_of_relative_positions(rows: int) -> None:
    """Tables per axis have a kernel on the CPU; one of all pairs is lowered as standard operators."""
    spec, size = replace(WINDOW, relative_scale=0.3), WINDOW.geometry.feature_size
    table = normal(HEADS, rows, HEAD_DIM)
    inputs = ["x", "x", "x", "", "", "", "", "table"]
    site = helper.make_node(spec.op_type, inputs, ["y"], domain=DOMAIN, **spec.attributes())
    graph = helper.make_graph(
        [site],
        "site",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *size, CHANNELS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = to_model(read(helper.make_model(graph, opset_imports=opsets, ir_version=9)))
    write_out(model, partial(covers, device="cpu"))
    assert any(node.domain == DOMAIN for node in model.graph.node) == (rows == 4 * 4 + 3 * 3)
    x = normal(2, *size, CHANNELS)
    operands = {"query": x, "key": x, "value": x, "relative_position": table}
    assert relative_error(compiled(model)(x), reference.flash_window_attention(spec, operands)) <= 5e-6


def test_both_outputs_of_windows_with_extra_queries_are_lowered() -> None:
    """Two sites: the extra tokens of the second are what those of the first attended."""
    size, tokens, windows = WINDOW.geometry.feature_size, 2, WINDOW.geometry.num_windows
    shapes = {"x": ["batch", *size, CHANNELS], "t": ["batch", windows, tokens, CHANNELS]}
    missing = [""] * 6
    sites = [
        helper.make_node(
            WINDOW.op_type, [x, x, x, *missing, t, t, t], [f"{x}y", f"{t}y"], domain=DOMAIN, **WINDOW.attributes()
        )
        for x, t in (("x", "t"), ("xy", "ty"))
    ]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        [*sites, node("ReduceMean", "tyy axes", "mean", keepdims=1), node("Add", "xyy mean", "z")],
        "sites",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("z", kind, None)],
        [onnx.numpy_helper.from_array(np.array([1, 2]), "axes")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = to_model(read(helper.make_model(graph, opset_imports=opsets, ir_version=9)))
    write_out(model, covers)
    assert not any(node.domain == DOMAIN for node in model.graph.node)
    run = compiled(model)
    for batch in (1, 3):
        x, t = normal(batch, *size, CHANNELS), normal(batch, windows, tokens, CHANNELS)
        arrays, expected = (x, t), (x, t)
        for _ in range(2):
            x, t = expected
            operands = {"query": x, "key": x, "value": x, "extra_query": t, "extra_key": t, "extra_value": t}
            found = reference.window_outputs(WINDOW, operands)
            expected = (found[0], found[1])
        mean = expected[1].mean((1, 2))[:, None, None]
        assert relative_error(run(*arrays), expected[0] + mean) <= 5e-6


@pytest.mark.parametrize("spec", [WINDOW, SLIDE], ids=["window", "slide"])
def test_sites_of_one_geometry_share_a_kernel(spec: Spec) -> None:
    from attnrewrite.lowering import build, importer
    from attnrewrite.lowering.targets import parse_target

    target = parse_target("cpu")
    description = build.tvm_target(target)
    built = build.build(importer.import_onnx(network(spec, 2), target, description), description)
    assert built.attention_kernels == 1
