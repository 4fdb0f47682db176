"""Kernels of SlideAttention made for CUDA, in the emulator: with the shared memory of CUDA, which Metal has not."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from attnrewrite.emulator import metal_target
from attnrewrite.lowering import limits
from attnrewrite.lowering.kernels import reference
from attnrewrite.lowering.kernels.gpu_builder import Limits
from tests.cuda.compiling import cuda_target
from tests.metal.cases import Case

ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def emulated_cuda(shared_bytes: int | None = None) -> tvm.target.Target:
    """A target for kernels; they compile where `allow_memory_of_cuda` was called. shared_bytes: less than CUDA has."""
    return tvm.target.Target(
        {**metal_target().export(), "max_shared_memory_per_block": shared_bytes or _shared_bytes()}
    )


def allow_memory_of_cuda(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(limits._SHARED_BYTES, "metal", _shared_bytes())


def _shared_bytes() -> int:
    return Limits.of(cuda_target("sm_80")).shared_bytes


def output_of(case: Case) -> tuple[tuple[int, ...], str]:
    """Shape and dtype."""
    value = case.operands["value"]
    return (*value.shape[:2], *case.spec.geometry.feature_size), str(value.dtype)


def error(case: Case, output: np.ndarray) -> float:
    """The largest, of what may be: weights are rounded once, which moves a result by that much of the largest value;
    and the result is rounded.
    """
    exact = {name: value.astype(np.float64) for name, value in case.operands.items()}
    expected = reference.slide_attention(case.spec, exact)
    bound = ROUNDOFF[str(output.dtype)] * (np.abs(exact["value"]).max() + np.abs(expected).max())
    return float(np.abs(output.astype(np.float64) - expected).max() / bound)
