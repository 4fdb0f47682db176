"""The softmax of the tensor-core kernels: in registers, on accumulators of logits, over tiles of keys one by one.

In a fragment of accumulators lane 4 g + t has columns (keys) 2 t and 2 t + 1 of rows (queries) g and g + 8: the halves
of a lane. Four lanes share a row, and exchange its maximum and sum by shuffles.
Source: Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135, algorithm 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from tvm import tirx

from attnrewrite.floats import lowest
from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    Expr,
    Frame,
    choose,
    combine_lanes,
    fill,
    registers,
    store,
    when,
)
from attnrewrite.lowering.kernels.tensor_core import TensorCore

# Where a running maximum starts, and what logits of keys outside the window are: masks may be as low as this.
START = lowest(np.dtype(np.float32))
HALVES = (0, 1)

_LOG2E = math.log2(math.e)
# From here on the product of a maximum with log2(e) is rounded by too much, by another error for each tile; the maximum
# is subtracted before.
_FAR = 1024.0


class RowSoftmax:
    """Of the logits of one tile of keys after the other, which it turns into weights where they lie.

    logits: float32 [4 tiles of 8 keys], in a fragment's order. total: of each half, the weights of this lane so far;
    after `finish`, 1 over those of the row. factor: of each half, scratch; see `meet`.
    """

    def __init__(self, frame: Frame, cores: TensorCore, logits: tirx.Buffer, count: int) -> None:
        self._frame, self._cores, self._logits, self._count = frame, cores, logits, count
        self._maximum, self.total, self.factor = (registers(2) for _ in range(3))

    def start(self) -> None:
        """Of rows without a key."""
        fill(self._maximum, 2, START)
        fill(self.total, 2, 0.0)

    def meet(self, *, rescale: bool) -> None:
        """Takes the logits into the running maximum. rescale: where tiles came before, and the total, with everything
        that was summed with it, has to be multiplied by `factor`; the total is here.
        """
        for half in HALVES:
            own = [self._logits[number] for number in self._numbers(half)]
            largest = functools.reduce(tirx.max, own, self._maximum[half])
            store(self.factor, [half], self._maximum[half])
            combine_lanes(self._frame, largest, tirx.max, self._maximum, half, lanes=4)
            if rescale:
                # Of the difference, which is exact where that of two products with log2(e) would not be.
                rise = (self.factor[half] - self._maximum[half]) * tirx.const(_LOG2E, ACCUMULATOR)
                store(self.factor, [half], self._cores.exp2(rise))
                store(self.total, [half], self.total[half] * self.factor[half])

    def weigh(self, is_key: Callable[[int], Expr | bool] = lambda number: True) -> None:
        """Turns the logits that were met into weights, and adds these to the total. Overwrites `factor`.

        is_key: of a logit's number; what is none has no weight. Neither has a logit of -inf.
        """
        log2e = tirx.const(_LOG2E, ACCUMULATOR)
        for half in HALVES:
            store(self.factor, [half], self._maximum[half] * tirx.const(-_LOG2E, ACCUMULATOR))
            with when(tirx.abs(self._maximum[half]) > _FAR):
                for number in self._numbers(half):
                    store(self._logits, [number], self._logits[number] - self._maximum[half])
                store(self.factor, [half], tirx.const(0.0, ACCUMULATOR))
        for number in range(self._count):
            half = number // 2 % 2
            weight = self._cores.exp2(self._cores.fma(self._logits[number], log2e, self.factor[half]))
            store(self._logits, [number], choose(is_key(number), weight, tirx.const(0.0, ACCUMULATOR)))
            store(self.total, [half], self.total[half] + self._logits[number])

    def finish(self) -> None:
        """total = 1 / the sum of all weights of the row, in all of its lanes."""
        for half in HALVES:
            combine_lanes(self._frame, self.total[half], lambda a, b: a + b, self.total, half, lanes=4)
            store(self.total, [half], self._cores.reciprocal(self.total[half]))

    def _numbers(self, half: int) -> list[int]:
        return [number for number in range(self._count) if number // 2 % 2 == half]
