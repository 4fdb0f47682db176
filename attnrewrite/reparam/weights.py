"""The numbers of a folded operator: computed in float64, rounded once, and what that loses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnrewrite.floats import ulp
from attnrewrite.reparam.operator import Operator, regrouped


@dataclass(frozen=True, eq=False)
class Weights:
    """The numbers of one group in float64 and in the model's type: kernel [O, I/groups, *taps], bias [O] or None."""

    exact: tuple[np.ndarray, ...]
    rounded: tuple[np.ndarray, ...]

    @property
    def are_finite(self) -> bool:
        return all(np.isfinite(r.astype(np.float64)).all() for r in self.rounded)

    @property
    def error(self) -> float:
        """The largest |rounded - exact|."""
        return max(float(np.abs(r.astype(np.float64) - e).max(initial=0.0)) for e, r in self._pairs())

    @property
    def error_in_ulp(self) -> float:
        """The largest error in units in the last place of the number it is an error of; at most 1/2."""
        return max(float((np.abs(r.astype(np.float64) - e) / ulp(r)).max(initial=0.0)) for e, r in self._pairs())

    def _pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.exact, self.rounded, strict=True))


def weights_of(operator: Operator, dtype: np.dtype) -> Weights:
    """Computed in float64 and rounded once."""
    kernel = operator.kernel()
    if not operator.axes:
        kernel = regrouped(kernel, operator.groups, 1)
    exact = (kernel,) if operator.bias is None else (kernel, operator.bias())
    with np.errstate(over="ignore"):  # `are_finite` tells
        return Weights(exact, tuple(e.astype(dtype) for e in exact))
