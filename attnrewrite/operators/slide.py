"""SlideAttention in torch, forward and backward: some images and heads at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.operators import general


def forward(spec: SlideAttention, operands: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The op's result (docs/ops.md). Raises ValueError where an operand's shape is not the op's."""
    return general.run(spec, operands)


def backward(
    spec: SlideAttention, operands: Mapping[str, Tensor], grads: Sequence[Tensor | None], wanted: Sequence[str]
) -> list[Tensor]:
    """Gradients of the operands named `wanted`, for that of the result."""
    leaves = {name: operand.detach().requires_grad_(name in wanted) for name, operand in operands.items()}
    with torch.enable_grad():
        (result,) = general.run(spec, leaves)
    return list(torch.autograd.grad(result, [leaves[name] for name in wanted], grads))
