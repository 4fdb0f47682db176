"""Any op of any spec on torch tensors: its body of standard operators, run node by node. Exact and differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import onnx
import torch

from attnrewrite.frontend.fx.emit import run_graph
from attnrewrite.functions import BODIES, predicted_weights
from attnrewrite.functions.spec import SlideAttention, Spec
from attnrewrite.graph import Graph, Value
from attnrewrite.operators.schema import number_of, result_shapes

# Of the opset that the table of torch functions reads; bodies are the same from 13 on.
_OPSET = 17


def run(spec: Spec, operands: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The op's results (docs/ops.md) for its operands, in the order of the spec.

    Raises ValueError where an operand's shape is not the op's.
    """
    result_shapes(spec, operands)
    formal = tuple((name, tuple(t.shape), t.dtype) for name, t in operands.items())
    return tuple(run_graph(_body(spec, formal), list(operands.values())))


@lru_cache(maxsize=256)
def _body(spec: Spec, formal: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]) -> Graph:
    helper = onnx.helper
    values = {n: Value(n, shape, helper.tensor_dtype_to_np_dtype(number_of(dtype))) for n, shape, dtype in formal}
    if isinstance(spec, SlideAttention) and spec.predicted:
        return predicted_weights.body(spec, values, _OPSET)
    return BODIES[spec.op_type](spec, values, _OPSET)
