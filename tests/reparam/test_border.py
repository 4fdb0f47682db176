"""Borders of constants are found; what pads a map with its own elements is told apart before any map is computed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from attnrewrite.frontend.onnx import read
from attnrewrite.graph import Value
from attnrewrite.reparam import border
from attnrewrite.reparam.border import read_border

BATCH, CHANNELS, HEIGHT, WIDTH = 2, 3, 5, 7
NUMBERS = np.array([1.5, 0.0, -2.0], np.float32)


def padded(*nodes: onnx.NodeProto) -> Value:
    """The result y of nodes on a map x. Constants: rows of NUMBERS, and what slices and pads name."""
    rows = np.broadcast_to(NUMBERS.reshape(1, -1, 1, 1), (BATCH, CHANNELS, 1, WIDTH)).copy()
    constants = {"rows": rows, "first": [0], "second": [1], "last": [-1], "end": [99], "axis": [2]}
    constants["pads"] = [0, 0, 1, 0, 0, 0, 1, 0]
    shapes = {"x": [BATCH, CHANNELS, HEIGHT, WIDTH], "y": [BATCH, CHANNELS, HEIGHT + 2, WIDTH]}
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items())
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    model = helper.make_model(helper.make_graph(list(nodes), "border", [x], [y], initializers))
    return read(model).outputs[0]


def test_rows_around_a_map() -> None:
    found = read_border(padded(helper.make_node("Concat", ["rows", "x", "rows"], ["y"], axis=2)))
    assert found is not None
    assert (found.inner.name, found.begin, found.end) == ("x", (1, 0), (1, 0))
    np.testing.assert_array_equal(found.numbers, NUMBERS)


OWN_ELEMENTS = {
    "circular": [
        helper.make_node("Slice", ["x", "last", "end", "axis"], ["below"]),
        helper.make_node("Slice", ["x", "first", "second", "axis"], ["above"]),
        helper.make_node("Concat", ["below", "x", "above"], ["y"], axis=2),
    ],
    "reflect": [helper.make_node("Pad", ["x", "pads"], ["y"], mode="reflect")],
}


@pytest.mark.parametrize("name", OWN_ELEMENTS)
def test_elements_of_the_map_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("a map was computed")

    monkeypatch.setattr(border, "_run", computed)
    assert read_border(padded(*OWN_ELEMENTS[name])) is None
