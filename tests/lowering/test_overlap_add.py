"""Col2Im on this CPU against ONNX Runtime, which TVM's importer does not know by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.lowering.compiling import compiled, model, node, normal, reference, relative_error

CASES = {
    "padded": ((5, 7), (3, 3), {"pads": [1, 1, 1, 1]}),
    "strided": ((6, 8), (3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "uneven": ((7, 6), (2, 3), {"pads": [0, 1, 1, 0], "strides": [2, 1], "dilations": [1, 2]}),
    "gaps": ((8, 9), (2, 1), {"strides": [3, 2]}),
    "one-axis": ((9,), (3,), {"pads": [1, 1], "strides": [2]}),
}


@pytest.mark.parametrize("name", CASES)
def test_overlap_add(name: str) -> None:
    image, block, attributes = CASES[name]
    axes = len(image)
    strides = attributes.get("strides", [1] * axes)
    dilations = attributes.get("dilations", [1] * axes)
    pads = attributes.get("pads", [0] * (2 * axes))
    blocks = math.prod(
        (image[a] + pads[a] + pads[axes + a] - dilations[a] * (block[a] - 1) - 1) // strides[a] + 1 for a in range(axes)
    )
    x = normal(2, 4 * math.prod(block), blocks)
    sizes = {"image": np.array(image, np.int64), "block": np.array(block, np.int64)}
    proto = model([node("Col2Im", "x image block", "y", **attributes)], {"x": list(x.shape)}, sizes, opset=18)
    assert relative_error(compiled(proto)(x), reference(proto, x)) <= 1e-6
