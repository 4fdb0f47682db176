"""The limits of floating-point types, bfloat16 among them, which numpy.finfo does not know."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def lowest(dtype: np.dtype) -> float:
    """The most negative finite number."""
    return float(ml_dtypes.finfo(dtype).min)  # type: ignore[no-untyped-call]


def step(dtype: np.dtype) -> float:
    """The distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
