"""Time and memory of calls on a CUDA device. Without one, calls are made and checked, and nothing is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], torch.Tensor]

WARM_UPS = 5
LEAST_RUNS, MOST_RUNS = 10, 200
SECONDS = 0.4  # of measuring one contestant
COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Measured:
    """median_ms, min_ms: of a call with cold L2. peak_mb: memory that a call takes beyond what lived before it."""

    median_ms: float
    min_ms: float
    runs: int
    peak_mb: float


class Clock:
    """Measures on the current CUDA device. device: where tensors belong, `cuda` or, in a dry run, `cpu`."""

    def __init__(self, dry: bool) -> None:
        self.device = "cpu" if dry else "cuda"
        if not dry:
            properties = torch.cuda.get_device_properties(0)
            self._flushed = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"

    def measure(self, run: Run) -> Measured | None:
        """Calls between two events each, after another kernel has written to more memory than the L2 cache holds.

        That kernel also takes longer than the host needs to launch the call, so that no launch is waited for.
        """
        if self.is_dry:
            run()
            return None
        for _ in range(WARM_UPS):
            run()
        taken: list[float] = []
        end_by = time.perf_counter() + SECONDS
        while len(taken) < LEAST_RUNS or (len(taken) < MOST_RUNS and time.perf_counter() < end_by):
            taken.append(self._once(run))
        return Measured(statistics.median(taken), min(taken), len(taken), self._peak_mb(run))

    def _once(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def _peak_mb(self, run: Run) -> float:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def poison(self, result: torch.Tensor) -> None:
        """Leave NaN where the next result will lie, which may be where this one lay: an element not written shows."""
        for tensor in [result, *(torch.empty_like(result) for _ in range(4))]:
            tensor.fill_(torch.nan)

    def copy_bandwidth(self) -> float | None:
        """Bytes read and written in a second, by copying."""
        if self.is_dry:
            return None
        source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        measured = self.measure(lambda: target.copy_(source))
        assert measured is not None
        return 2 * COPIED_BYTES / (measured.median_ms / 1e3)

    def describe(self) -> dict[str, Any]:
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
        return {"device": "none" if self.is_dry else torch.cuda.get_device_name(), **versions}
