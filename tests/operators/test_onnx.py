"""Exports to ONNX of modules in which the two ops stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import torch
from torch import nn

from attnrewrite.frontend.onnx import read
from attnrewrite.functions import spec_of
from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec
from attnrewrite.localattention.geometry import NeighborhoodGeometry, WindowGeometry
from attnrewrite.operators.onnx import add_functions, export, translation_table
from attnrewrite.operators.schema import call
from tests.running import error, run

WINDOWS = FlashWindowAttention(WindowGeometry((8, 12), (4, 4), (2, 2)), 3, 0.5, mask_value=-100.0)
DOUBLE = FlashWindowAttention(WindowGeometry((8, 12), (4, 4), (0, 0)), 3, 0.5, softmax_dtype=11)
NEIGHBOURS = SlideAttention(NeighborhoodGeometry((7, 9), (3, 3), (1, 1), "zero"), 3, 0.5)
PREDICTED = SlideAttention(NeighborhoodGeometry((7, 9), (3, 3), (1, 1), "zero"), 3, 1.0, 0, "logits")


class Op(nn.Module):
    """One of the ops; operands by name."""

    def __init__(self, spec: Spec, *names: str) -> None:
        super().__init__()
        self.spec, self.names = spec, names

    def forward(self, *operands: torch.Tensor) -> Any:
        overload, args, keywords = call(self.spec, dict(zip(self.names, operands, strict=True)))
        return overload(*args, **keywords)


def maps(batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, 8, 12, 12) for _ in range(3)]


def images(batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, 12, 7, 9) for _ in range(3)]


MAPS = ("query", "key", "value")
CASES: dict[str, tuple[Op, list[torch.Tensor]]] = {
    "windows": (Op(WINDOWS, *MAPS), maps()),
    "a later operand": (Op(WINDOWS, *MAPS, "mask"), [*maps(), torch.randn(6, 16, 16)]),
    "softmax in double": (Op(DOUBLE, *MAPS), maps()),
    "extra queries": (Op(DOUBLE, *MAPS, "extra_query"), [*maps(), torch.randn(2, 6, 2, 12)]),
    "neighbours": (Op(NEIGHBOURS, *MAPS, "bias"), [*images(), torch.randn(3, 9)]),
    "predicted": (Op(PREDICTED, "value", "logits"), [torch.randn(2, 12, 7, 9), torch.randn(2, 27, 7, 9)]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_op_is_one_node_with_a_body(name: str, tmp_path: Path) -> None:
    module, inputs = CASES[name]
    export(module, tuple(inputs), tmp_path / "op.onnx", verbose=False)
    model = onnx.load(tmp_path / "op.onnx")
    onnx.checker.check_model(model)
    (node,) = [n for n in model.graph.node if n.domain == "attnrewrite"]
    (function,) = model.functions
    assert (node.op_type, node.overload) == (function.name, function.overload)
    found = run(model, {i.name: x.numpy() for i, x in zip(model.graph.input, inputs, strict=True)})
    expected = module(*inputs)
    for array, tensor in zip(found.values(), [expected] if torch.is_tensor(expected) else expected, strict=True):
        assert error(array, tensor.numpy()) <= 2e-6


def test_the_node_says_what_the_op_is() -> None:
    module, inputs = CASES["windows"]
    program = export(module, tuple(inputs), verbose=False)
    (node,) = [n for n in read(program.model_proto).nodes if n.domain == "attnrewrite"]
    assert spec_of(node) == WINDOWS


def test_by_the_exporter_itself() -> None:
    """Its optimiser writes functions out, so the table gives the nodes, and their bodies come afterwards."""
    module, inputs = CASES["neighbours"]
    program = torch.onnx.export(
        module, tuple(inputs), dynamo=True, custom_translation_table=translation_table(), verbose=False
    )
    assert program is not None and not program.model_proto.functions
    assert [n.op_type for n in program.model_proto.graph.node] == ["SlideAttention"]
    add_functions(program)
    assert len(program.model_proto.functions) == 1
    add_functions(program)  # once more changes nothing
    assert len(program.model_proto.functions) == 1


def test_symbolic_batch_and_an_older_opset() -> None:
    module, inputs = CASES["windows"]
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(module, tuple(inputs), dynamic_shapes={"operands": tuple({0: batch} for _ in inputs)})
    model = export(program, opset_version=18, verbose=False).model_proto
    assert {i.domain: i.version for i in model.opset_import}[""] == 18
    assert {i.version for i in model.functions[0].opset_import} == {18}
    others = maps(5)
    found = run(model, {i.name: x.numpy() for i, x in zip(model.graph.input, others, strict=True)})
    assert error(next(iter(found.values())), module(*others).numpy()) <= 2e-6
    assert np.shape(next(iter(found.values())))[0] == 5
