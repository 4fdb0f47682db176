"""The types that weights come in, and how finely they tell numbers apart."""

from __future__ import annotations

import numpy as np

# (bits of the significand after the point, smallest exponent). NumPy has no bfloat16 of its own to be asked about.
_FORMATS = {"float16": (10, -14), "bfloat16": (7, -126), "float32": (23, -126), "float64": (52, -1022)}


def is_weight_type(dtype: np.dtype) -> bool:
    return dtype.name in _FORMATS


def precision(dtype: np.dtype) -> float:
    """The distance from 1 to the next number."""
    return 2.0 ** -_FORMATS[dtype.name][0]


def ulp(numbers: np.ndarray) -> np.ndarray:
    """The unit in the last place of every number, float64."""
    bits, smallest = _FORMATS[numbers.dtype.name]
    exponents = np.frexp(np.abs(numbers.astype(np.float64)))[1] - 1
    return np.ldexp(1.0, np.maximum(exponents, smallest) - bits)
