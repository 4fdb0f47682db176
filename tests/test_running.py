"""The measure that other tests lean on fails where it must."""

from __future__ import annotations

import numpy as np
import pytest

from tests.running import error


def test_error_sees_a_factor_a_shuffle_and_a_nan() -> None:
    expected = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    assert error(expected, expected) == 0
    assert error(2 * expected, expected) == pytest.approx(1)
    assert error(expected[::-1], expected) > 0.1
    with pytest.raises(AssertionError):
        error(np.where(expected > 0, np.nan, expected), expected)
    with pytest.raises(AssertionError):
        error(expected[:1], expected)
