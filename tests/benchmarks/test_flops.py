"""FLOPs and bytes of small graphs against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnrewrite.functions.spec import DOMAIN, FlashWindowAttention, SlideAttention
from attnrewrite.localattention.geometry import NeighborhoodGeometry, WindowGeometry
from benchmarks.flops import work_of
from tests import tiny

FLOAT = TensorProto.FLOAT


def graph_of(node: onnx.NodeProto, shapes: dict[str, list], out: list[int], weights: dict[str, np.ndarray]):
    inputs = {name: (FLOAT, shape) for name, shape in shapes.items()}
    model = helper.make_model(
        helper.make_graph(
            [node],
            "graph",
            [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info("y", FLOAT, out)],
            [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    return work_of(model)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("op", "attributes", "x", "weight", "out", "multiplied"),
    [
        ("MatMul", {}, [2, 5, 7], zeros(7, 11), [2, 5, 11], 2 * 5 * 7 * 11),
        ("Gemm", {"transB": 1}, [5, 7], zeros(11, 7), [5, 11], 5 * 7 * 11),
        ("Gemm", {"transA": 1}, [7, 5], zeros(7, 11), [5, 11], 5 * 7 * 11),
        ("Conv", {"pads": [1, 1, 1, 1]}, [1, 3, 8, 8], zeros(5, 3, 3, 3), [1, 5, 8, 8], 64 * 5 * 27),
        ("Conv", {"group": 6, "strides": [2, 2]}, [1, 6, 9, 9], zeros(6, 1, 3, 3), [1, 6, 4, 4], 16 * 6 * 9),
        ("ConvTranspose", {"strides": [2, 2]}, [1, 4, 5, 5], zeros(4, 3, 2, 2), [1, 3, 10, 10], 25 * 4 * 3 * 4),
        ("Einsum", {"equation": "bij,jk->bik"}, [2, 5, 7], zeros(7, 11), [2, 5, 11], 2 * 5 * 7 * 11),
    ],
)
def test_products(op, attributes, x, weight, out, multiplied):
    work = graph_of(helper.make_node(op, ["x", "w"], ["y"], **attributes), {"x": x}, out, {"w": weight})
    assert (work.products, work.attention) == (2 * multiplied, 0)
    assert work.compulsory == work.moved == 4 * (np.prod(x) + weight.size + np.prod(out))


def test_what_lies_between_products_moves_nothing():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    work = work_of(tiny.model_of(nodes, {"x": (FLOAT, [5, 7])}, {"y": (FLOAT, [5, 7])}, {"w": zeros(7, 7)}))
    assert work.compulsory == 4 * (35 + 49 + 35)
    assert work.moved == 4 * (4 * 35 + 49)


def attention(spec, shapes: dict[str, list], out: list[int]):
    names = [name if name in shapes else "" for name in spec.operands]
    while not names[-1]:
        names.pop()
    node = helper.make_node(spec.op_type, names, ["y"], domain=DOMAIN, **spec.attributes())
    return graph_of(node, shapes, out, {})


def test_windows_count_every_pixel_of_the_map_with_the_keys_of_its_window():
    """10 x 9 pixels in windows of 4 x 4: padded to 12 x 12, of which 90 pixels are asked for."""
    spec = FlashWindowAttention(WindowGeometry((10, 9), (4, 4), (0, 0)), num_heads=2, scale=1.0)
    map_ = [3, 10, 9, 8]
    work = attention(spec, {"query": map_, "key": map_, "value": map_}, map_)
    assert work.attention == 2 * 3 * 90 * 16 * (8 + 8)
    assert work.moved == work.compulsory == 4 * 4 * 3 * 90 * 8


def test_relative_positions_of_windows_count_one_product_per_axis():
    spec = FlashWindowAttention(WindowGeometry((8, 8), (4, 4), (0, 0)), num_heads=2, scale=1.0)
    map_ = [1, 8, 8, 8]
    tables = {"relative_position": [1, 4 * 4 + 4 * 4, 4]}
    work = attention(spec, {"query": map_, "key": map_, "value": map_, **tables}, map_)
    assert work.attention == 2 * 64 * (16 * (8 + 8) + (4 + 4) * 8)


def test_neighbourhoods_count_every_slot_and_the_learned_kernels():
    spec = SlideAttention(NeighborhoodGeometry((10, 9), (3, 3), (1, 1), "zero"), num_heads=2, scale=1.0)
    map_ = [1, 8, 10, 9]
    plain = attention(spec, {"query": map_, "key": map_, "value": map_}, map_)
    assert plain.attention == 2 * 90 * 9 * (8 + 8)
    learned = attention(spec, {"query": map_, "key": map_, "value": map_, "key_kernel": [4, 9, 3, 3]}, map_)
    assert learned.attention == plain.attention + 2 * 90 * 9 * 8 * 9


def test_symbolic_shapes_are_refused():
    with pytest.raises(ValueError, match="no static shape"):
        work_of(tiny.linear(batch="batch"))
