"""Every spec is expressible as a call, and a call says its spec; shapes are checked and told without computing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")


from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention  # noqa: E402
from attnrewrite.lowering.kernels import reference  # noqa: E402
from attnrewrite.operators.schema import OPERATORS, bind, call, operator_of, spec_of  # noqa: E402
from tests.functions import test_bodies, test_predicted_weights  # noqa: E402

CASES: dict[str, Any] = {**test_bodies.CASES, **{f"predicted-{n}": c for n, c in test_predicted_weights.CASES.items()}}


def tensors(case: Any) -> dict[str, Any]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in case.operands().items()}


def expected(case: Any) -> list[np.ndarray]:
    """What the op means, in NumPy."""
    if hasattr(case, "outputs"):
        return list(case.outputs().values())
    return [reference.slide_attention(case.spec, case.operands())]


@pytest.mark.parametrize("name", CASES)
def test_a_call_says_its_spec(name: str) -> None:
    case = CASES[name]
    operands = {n: n for n in case.operands()}  # anything may stand for a tensor
    overload, args, keywords = call(case.spec, operands)
    assert spec_of(overload, keywords) == case.spec
    operator = operator_of(overload)
    assert operator is not None
    assert bind(operator, args, keywords) == (case.spec, operands)


@pytest.mark.parametrize("name", CASES)
def test_operands_may_be_named(name: str) -> None:
    case = CASES[name]
    overload, args, keywords = call(case.spec, {n: n for n in case.operands()})
    operator = operator_of(overload)
    assert operator is not None
    named = dict(zip(operator.operands, args, strict=False))
    assert bind(operator, (), keywords | named) == bind(operator, args, keywords)


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_told_without_computing(name: str) -> None:
    case = CASES[name]
    overload, args, keywords = call(case.spec, {n: t.to("meta") for n, t in tensors(case).items()})
    found = overload(*args, **keywords)
    found = found if isinstance(found, tuple) else (found,)
    assert [tuple(f.shape) for f in found] == [o.shape for o in expected(case)]
    assert all(f.dtype == args[0].dtype for f in found)


class Op(torch.nn.Module):
    """The op of a case on operands given by name."""

    def __init__(self, case: Any) -> None:
        super().__init__()
        self.case = case

    def forward(self, operands: dict[str, Any]) -> Any:
        overload, args, keywords = call(self.case.spec, operands)
        return overload(*args, **keywords)


@pytest.mark.parametrize("name", ["shifted-with-mask", "extra-queries", "learned", "predicted-overlap-add"])
def test_the_batch_may_be_symbolic(name: str) -> None:
    case = CASES[name]
    operands = tensors(case)
    batched = ("query", "key", "value", "logits", "extra_query", "extra_key", "extra_value")
    dims = {n: {0: torch.export.Dim("batch")} if n in batched else None for n in operands}
    program = torch.export.export(Op(case), (operands,), dynamic_shapes=(dims,))
    (node,) = [n for n in program.graph.nodes if n.op == "call_function" and operator_of(n.target) is not None]
    values = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
    assert all(isinstance(v.shape[0], torch.SymInt) for v in values)


def test_every_attribute_has_a_type() -> None:
    """An attribute added to a spec must be added to the schema."""
    for case in CASES.values():
        overload, _, _ = call(case.spec, {n: n for n in case.operands()})
        operator = operator_of(overload)
        assert operator is not None
        assert set(case.spec.attributes()) <= set(operator.attributes)
    operands = {name for operator in OPERATORS.values() for name in operator.operands}
    assert operands == {*FlashWindowAttention.operands, *SlideAttention.operands}


def test_the_softmax_dtype_is_one_of_torch() -> None:
    spec = replace(CASES["shifted-with-mask"].spec, softmax_dtype=onnx.TensorProto.FLOAT)
    overload, _, keywords = call(spec, dict.fromkeys(("query", "key", "value"), 0))
    assert keywords["softmax_dtype"] is torch.float32
    assert spec_of(overload, keywords) == spec


def test_a_mask_value_may_be_infinite() -> None:
    overload, _, keywords = call(CASES["shifted-excluding"].spec, dict.fromkeys(("query", "key", "value"), 0))
    assert keywords["mask_value"] == -math.inf
    assert spec_of(overload, keywords) == CASES["shifted-excluding"].spec


def test_what_may_be_absent_has_a_default() -> None:
    x = torch.zeros(2, 8, 12, 6, device="meta")
    plain = {"num_heads": 3, "scale": 1.0, "feature_size": [8, 12]}
    assert torch.ops.attnrewrite.flash_window_attention(x, x, x, window_size=[4, 4], **plain).shape == x.shape
    x = x.permute(0, 3, 1, 2)
    assert torch.ops.attnrewrite.slide_attention(x, x, x, kernel_size=[3, 3], **plain).shape == x.shape


WRONG = {
    "query": ("query must have the shape [any, 8, 12, 15], got (2, 8, 11, 15)", (2, 8, 11, 15)),
    "key": ("key must have the shape [any, 8, 12, 15], got (2, 8, 12, 18)", (2, 8, 12, 18)),
    "bias": ("bias must have the shape [1 or 6, 3, 16, 16], got (3, 16, 16)", (3, 16, 16)),
    "value": ("3 heads do not divide the 20 channels of value", (2, 8, 12, 20)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shape_is_told(name: str) -> None:
    case = CASES["shifted-with-mask"]
    sentence, shape = WRONG[name]
    operands = {n: t.to("meta") for n, t in tensors(case).items()} | {name: torch.zeros(shape, device="meta")}
    overload, args, keywords = call(case.spec, operands)
    with pytest.raises(ValueError) as error:
        overload(*args, **keywords)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("case", "name"), [("shifted-with-mask", "value"), ("k3", "key"), ("predicted-logits", "logits")]
)
def test_maps_of_several_batches_are_told(case: str, name: str) -> None:
    """Kernels would read beyond the end of one that is a part of a wider map."""
    operands = tensors(CASES[case])
    overload, args, keywords = call(CASES[case].spec, operands | {name: operands[name][:1]})
    with pytest.raises(ValueError, match="must have one batch, got "):
        overload(*args, **keywords)


def test_an_operand_of_another_form_is_told() -> None:
    with pytest.raises(ValueError, match="slide_attention_predicted has no operand 'query'"):
        call(CASES["predicted-logits"].spec, {"query": 0, "value": 0, "logits": 0})
