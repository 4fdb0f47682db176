"""Which GPU kernel computes one of the two ops."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from tvm import tirx
from tvm.target import Target

from attnrewrite.functions.spec import FlashWindowAttention, Spec
from attnrewrite.lowering.kernels import (
    slide_gpu,
    slide_gpu_predicted,
    slide_tensor,
    slide_tensor_learned,
    slide_tensor_learned_plan,
    slide_tensor_plan,
    window_gpu,
    window_tensor,
    window_tensor_plan,
)
from attnrewrite.lowering.kernels.gpu_builder import Operands


def attention_kernel(
    spec: Spec,
    shapes: Mapping[str, tuple[Any, ...]],
    dtypes: Mapping[str, str],
    target: Target,
    name: str,
    steps: Mapping[str, int] = types.MappingProxyType({}),
) -> tirx.PrimFunc:
    """The kernel for operands of these shapes and dtypes; an extent that is no number is the batch. steps: of those of
    query, key and value that are parts of wider maps, as the kernels take them.
    """
    operands = Operands(shapes, dtypes["value"], dtypes, steps)
    if isinstance(spec, FlashWindowAttention):
        # Tensor cores' operands are copied two channels at a time or more.
        in_pairs = all(step % 2 == 0 for step in steps.values())
        on_tensor_cores = in_pairs and window_tensor_plan.takes(spec, shapes, operands.dtype, target)
        window_kernel = window_tensor if on_tensor_cores else window_gpu
        return window_kernel.flash_window_attention(spec, operands, target, name)
    if spec.predicted:
        return slide_gpu_predicted.predicted_attention(spec, operands, target, name)
    if slide_tensor_learned_plan.takes(spec, shapes, operands.dtype, target):
        return slide_tensor_learned.slide_attention(spec, operands, target, name)
    if slide_tensor_plan.takes(spec, shapes, operands.dtype, target):
        return slide_tensor.slide_attention(spec, operands, target, name)
    return slide_gpu.slide_attention(spec, operands, target, name)
