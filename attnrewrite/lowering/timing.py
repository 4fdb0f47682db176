"""Kernels compiled alone and timed in turns on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, tirx

from attnrewrite import runtime
from attnrewrite.lowering.choices import Choice, Choices, Product
from attnrewrite.lowering.kernels.vector_math import vector_unit
from attnrewrite.lowering.packing import repacked
from attnrewrite.lowering.schedules.cpu import schedule_function
from attnrewrite.lowering.schedules.stack import PIPELINE

# One measurement: so many seconds or runs, whichever comes first, and so many runs at least.
SECONDS, MOST_RUNS, FEWEST_RUNS = 0.15, 200, 3

# A candidate this much slower after the fewest runs is not measured further.
HOPELESS = 1.2

# In a model the weights of a kernel come from memory, what it works on from the cache: a run reads its weights from
# another place in so many bytes than the run before.
COLD_BYTES = 64 * 1024 * 1024

# Addresses that generated code may count on, in bytes.
ALIGNMENT = 64


@dataclass(frozen=True)
class Kernel:
    """A fused function of a model with one matrix product in it.

    calls: per run of the model, of this function and of others with an equal product. constant: by parameter, whether
    its argument is the same at every run of the model.
    """

    product: Product
    func: tirx.PrimFunc
    calls: int
    constant: tuple[bool, ...]


class Timer:
    """Times kernels of products in turns; what was compiled last for a product is kept."""

    def __init__(self, kernels: Iterable[Kernel], target: tvm.target.Target) -> None:
        self._kernels = {kernel.product: kernel for kernel in kernels}
        self._target = target
        self._compiled: dict[Product, dict[Choice | None, _Compiled]] = {}
        self._weights = _Weights()

    def __call__(self, product: Product, choices: Sequence[Choice | None]) -> list[float]:
        """Seconds of one run with each choice: minima over runs that take turns."""
        kernel, kept = self._kernels[product], self._compiled.get(product, {})
        self._compiled[product] = {c: kept[c] if c in kept else _Compiled(kernel, c, self._target) for c in choices}
        runs = [self._compiled[product][choice].run(self._weights) for choice in choices]
        best = [math.inf] * len(choices)
        start = time.perf_counter()
        for turn in range(MOST_RUNS):
            if turn >= FEWEST_RUNS and (time.perf_counter() - start > SECONDS or best[0] > HOPELESS * min(best)):
                break
            best = [min(b, run()) for b, run in zip(best, runs, strict=True)]
        return best


class _Compiled:
    """A kernel in machine code."""

    def __init__(self, kernel: Kernel, choice: Choice | None, target: tvm.target.Target) -> None:
        unit = vector_unit(target)
        func, tuned = kernel.func, Choices()
        if choice is not None:
            tuned = Choices({kernel.product.key: choice})
            if kernel.product.packed:
                func = repacked(func, kernel.product.columns, choice.vectors * unit.lanes)
        func = schedule_function(func, unit, tuned).with_attr("global_symbol", "kernel")
        with target, tvm.transform.PassContext(opt_level=3):
            executable = tvm.compile(IRModule({"kernel": func}), target, tir_pipeline=PIPELINE)
        self._function = executable["kernel"]
        self._params = [*zip(func.params, kernel.constant, strict=True)]

    def run(self, weights: _Weights) -> Callable[[], float]:
        """What runs it once and returns the seconds, after a first run that starts threads and touches memory."""
        data = [None if constant else _tensor(param) for param, constant in self._params]

        def run() -> float:
            arguments = [
                weights.take(param) if given is None else given
                for (param, _), given in zip(self._params, data, strict=True)
            ]
            start = time.perf_counter()
            self._function(*arguments)
            return time.perf_counter() - start

        run()
        return run


class _Weights:
    """COLD_BYTES of numbers that weights are taken from, one place after the other."""

    def __init__(self) -> None:
        self._numbers: dict[str, np.ndarray] = {}
        self._position = 0

    def take(self, buffer: tirx.Buffer) -> Any:
        """A tensor for the buffer that lies where no recent one does."""
        shape, dtype, size = [int(extent) for extent in buffer.shape], str(buffer.dtype), int(buffer.dtype.itemsize)
        count, step = math.prod(shape), ALIGNMENT // size
        if dtype not in self._numbers or self._numbers[dtype].size < count:
            self._numbers[dtype] = _numbers(max(count, COLD_BYTES // size), dtype)
        numbers = self._numbers[dtype]
        if self._position + count > numbers.size:
            self._position = 0
        found = numbers[self._position : self._position + count].reshape(shape)
        self._position += -(-count // step) * step
        return tvm.runtime.from_dlpack(found)


def _tensor(buffer: tirx.Buffer) -> Any:
    shape = [int(extent) for extent in buffer.shape]
    return tvm.runtime.tensor(_numbers(math.prod(shape), str(buffer.dtype)).reshape(shape))


def _numbers(count: int, dtype: str) -> np.ndarray:
    """Of ordinary size: denormal numbers and NaN would take other paths through the arithmetic; indices are 0."""
    numbers = runtime.empty_aligned([count], dtype)
    whole = dtype == "bool" or np.issubdtype(dtype, np.integer)
    numbers[:] = 0 if whole else np.random.default_rng(0).random(count, np.float32) - np.float32(0.5)
    return numbers
