"""The operator vocabulary by class. Names are ONNX's (opset 13 and later), whatever the frontend.

* movement: has an indexing rule (`indexing/rules.py`), its output elements are input elements or one fill value
* pointwise: one output element from the elements at the same place, constants broadcast against it
* channelwise: mixes the elements of one axis, the same way at every other place (Linear, LayerNorm, norms)
* contraction: a sum over products of two computed tensors (`localattention/contraction.py`)

Pointwise and channelwise operators treat every token alike, so the movement of tokens commutes with them.
"""

from __future__ import annotations

UNARY = frozenset(
    {
        "Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
        "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus",
        "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu", "Sum"})
POINTWISE = UNARY | BINARY

# Channelwise where their axis is a channel axis; so are MatMul, Gemm and 1 x 1 Conv with constant weights
# (`localattention/tokens.py` says when).
REDUCTIONS = frozenset({"ReduceL1", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceMax", "ReduceMin"})
NORMALISATIONS = frozenset({"LayerNormalization", "LpNormalization", "RMSNormalization"})
