"""Floating-point types and their limits, bfloat16 among them, which numpy.finfo does not know."""

from __future__ import annotations

import ml_dtypes
import numpy as np

_NAMES = frozenset({"float16", "bfloat16", "float32", "float64"})


def is_float(dtype: np.dtype) -> bool:
    """Whether weights and activations come in this type."""
    return dtype.name in _NAMES


def lowest(dtype: np.dtype) -> float:
    """The most negative finite number."""
    return float(ml_dtypes.finfo(dtype).min)  # type: ignore[no-untyped-call]


def step(dtype: np.dtype) -> float:
    """The distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def ulp(numbers: np.ndarray) -> np.ndarray:
    """The unit in the last place of every number, float64."""
    limits = ml_dtypes.finfo(numbers.dtype)  # type: ignore[no-untyped-call]
    exponents = np.frexp(np.abs(numbers.astype(np.float64)))[1] - 1
    return np.ldexp(1.0, np.maximum(exponents, int(limits.minexp)) - int(limits.nmant))
