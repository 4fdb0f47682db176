"""The body of SlideAttention with predicted logits or weights, in ONNX Runtime against the NumPy reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
from onnx import helper

from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.functions.spec import DOMAIN, SlideAttention
from attnrewrite.localattention.geometry import NeighborhoodGeometry
from attnrewrite.lowering.kernels import reference
from tests.passes.rewritten import ranks
from tests.running import error, run

HEADS, VALUE_DIM, BATCH = 3, 5, 2
FLOAT32, FLOAT16 = 2e-6, 4e-3  # of max |reference|: sums of up to 225 terms, each rounded to 2**-24 or 2**-11


@dataclass(frozen=True)
class Case:
    """An op on random operands."""

    spec: SlideAttention
    bias: bool = False
    dtype: type = np.float32

    def operands(self) -> dict[str, np.ndarray]:
        rng, spec = np.random.default_rng(0), self.spec
        rows = HEADS * spec.geometry.keys_per_query * spec.rows_per_pixel
        shapes = {
            "value": (BATCH, HEADS * VALUE_DIM, *spec.geometry.key_size),
            "bias": (HEADS, spec.geometry.keys_per_query),
            "logits": (BATCH, rows, *spec.geometry.feature_size),
        }
        names = ["value", *(["bias"] if self.bias else []), "logits"]
        return {n: rng.normal(size=shapes[n]).astype(self.dtype) for n in names}

    def model(self, opset: int = 17, *, inline: bool = False, batch: int | str = BATCH) -> onnx.ModelProto:
        operands = self.operands()
        names = [n if n in operands else "" for n in self.spec.operands]
        node = helper.make_node("SlideAttention", names, ["y"], name="op", domain=DOMAIN, **self.spec.attributes())
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))

        def declared(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
            own = list(shape) if name == "bias" else [batch, *shape[1:]]
            return helper.make_tensor_value_info(name, kind, own)

        output = declared("y", (BATCH, HEADS * VALUE_DIM, *self.spec.output_size))
        graph = helper.make_graph([node], "op", [declared(n, a.shape) for n, a in operands.items()], [output])
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
        return to_model(read(helper.make_model(graph, opset_imports=imports, ir_version=10)), inline=inline)


def op(
    size: tuple[int, ...], kernel: tuple[int, ...], predicted: str = "logits", scale: float = 1.0, **more: object
) -> SlideAttention:
    """A spec; `more` names fields of the geometry (dilation, stride ...) and of the op (overlap_add ...)."""
    own = {k: more.pop(k) for k in ("overlap_add", "upsampling") if k in more}
    geometry = NeighborhoodGeometry(size, kernel, more.pop("dilation", (1,) * len(size)), **more)  # type: ignore[arg-type]
    return SlideAttention(geometry, HEADS, scale, 0, predicted, **own)  # type: ignore[arg-type]


FOLDED = {"overlap_add": True}
CASES: dict[str, Case] = {
    "logits": Case(op((6, 7), (3, 3))),
    "logits-scaled-with-bias": Case(op((6, 7), (3, 3), scale=0.375), bias=True),
    "weights": Case(op((6, 7), (3, 5), "weights", dilation=(2, 1))),
    "one-axis": Case(op((11,), (5,))),
    "three-axes": Case(op((3, 4, 5), (3, 1, 3), "weights")),
    "replicate": Case(op((6, 7), (3, 3), border="replicate")),
    "even-kernel": Case(op((6, 7), (2, 4), "weights")),
    "strided": Case(op((3, 4), (3, 3), stride=(2, 2), key_size=(6, 8))),
    "overlap-add": Case(op((6, 7), (3, 3), **FOLDED)),
    "overlap-add-weights": Case(op((6, 7), (3, 3), "weights", **FOLDED)),
    "overlap-add-scaled-with-bias": Case(op((6, 7), (3, 3), scale=0.375, **FOLDED), bias=True),
    "overlap-add-strided": Case(op((3, 4), (3, 3), stride=(2, 2), key_size=(6, 8), **FOLDED)),
    "overlap-add-strided-uneven": Case(op((3, 4), (3, 5), stride=(2, 3), key_size=(5, 10), **FOLDED)),
    "overlap-add-apart": Case(op((2, 3), (2, 2), stride=(3, 3), key_size=(6, 9), offset=(0, 1), **FOLDED)),
    "overlap-add-dilated": Case(op((6, 7), (3, 3), dilation=(2, 1), **FOLDED)),
    "overlap-add-of-one-axis": Case(op((5,), (3,), stride=(2,), key_size=(9,), **FOLDED)),
    "overlap-add-of-three-axes": Case(op((2, 3, 4), (3, 1, 3), stride=(2, 1, 1), key_size=(4, 3, 4), **FOLDED)),
    "upsampling": Case(op((4, 5), (3, 3), upsampling=(2, 2))),
    "upsampling-uneven-with-bias": Case(op((4, 5), (3, 3), upsampling=(3, 2)), bias=True),
    "upsampling-weights": Case(op((4, 5), (5, 3), "weights", upsampling=(1, 4))),
    "upsampling-of-one-axis": Case(op((4,), (3,), upsampling=(3,))),
    "upsampling-of-three-axes": Case(op((2, 3, 2), (3, 1, 3), upsampling=(2, 3, 2))),
}


@pytest.mark.parametrize("name", CASES)
def test_body_equals_the_reference(name: str) -> None:
    case = CASES[name]
    expected = reference.slide_attention(case.spec, case.operands())
    assert expected.shape == (BATCH, HEADS * VALUE_DIM, *case.spec.output_size)
    found = run(case.model(), case.operands())["y"]
    assert error(found, expected) < FLOAT32
    inlined = case.model(13, inline=True, batch="batch")
    assert ranks(inlined) <= 5
    assert not {n.op_type for n in inlined.graph.node} & {"Col2Im", "ScatterND", "ScatterElements", "ConvTranspose"}
    found = run(inlined, case.operands())["y"]
    assert error(found, expected) < FLOAT32


@pytest.mark.parametrize("name", ["logits", "overlap-add-strided", "upsampling-weights"])
def test_body_in_float16(name: str) -> None:
    case = replace(CASES[name], dtype=np.float16)
    found = run(case.model(), case.operands())["y"]
    assert error(found, reference.slide_attention(case.spec, case.operands())) < FLOAT16


@pytest.mark.parametrize("name", CASES)
def test_attributes_round_trip(name: str) -> None:
    spec = CASES[name].spec
    assert SlideAttention.from_attributes(spec.attributes()) == spec


def test_strided_overlap_add_by_hand() -> None:
    """Two blocks of two, one pixel apart, weights one: every value is added to both places of its block's sum."""
    geometry = NeighborhoodGeometry((2,), (2,), (1,), stride=(1,), key_size=(3,), offset=(0,))
    spec = SlideAttention(geometry, 1, 1.0, 0, "weights", True)
    operands = {"value": np.array([[[1.0, 10.0, 100.0]]]), "logits": np.ones((1, 4, 2))}
    assert reference.slide_attention(spec, operands).tolist() == [[[11.0, 121.0, 110.0]]]
