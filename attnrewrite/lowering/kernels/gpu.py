"""Which GPU kernel computes one of the two ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import tirx
from tvm.target import Target

from attnrewrite.functions.spec import FlashWindowAttention, Spec
from attnrewrite.lowering.kernels import slide_gpu, slide_gpu_predicted, window_gpu, window_tensor
from attnrewrite.lowering.kernels.window_tensor_plan import takes


def attention_kernel(
    spec: Spec, shapes: Mapping[str, tuple[Any, ...]], dtypes: Mapping[str, str], target: Target, name: str
) -> tirx.PrimFunc:
    """The kernel for operands of these shapes and dtypes; an extent that is no number is the batch."""
    present, extents, dtype = [*shapes], [*shapes.values()], dtypes["value"]
    if isinstance(spec, FlashWindowAttention):
        window_kernel = window_tensor if takes(spec, shapes, dtype, target) else window_gpu
        return window_kernel.flash_window_attention(spec, present, extents, dtype, target, name, dtypes)
    if spec.predicted:
        return slide_gpu_predicted.predicted_attention(spec, present, extents, dtype, target, name, dtypes)
    return slide_gpu.slide_attention(spec, present, extents, dtype, target, name, dtypes)
