"""The order in which candidates are tried, and when one is believed to be faster. Nothing here compiles or runs code.

Time goes where there is most to win: to the product whose calls lose most against the best rate seen, less the more of
its candidates were tried without success.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from attnrewrite.lowering.choices import Choice, Product
from attnrewrite.lowering.remembered import Finding

# A candidate must need this share less time, twice: minima of a quiet machine differ by less from run to run.
MARGIN = 0.02


class Measure(Protocol):
    def __call__(self, product: Product, choices: Sequence[Choice | None]) -> list[float]:
        """Seconds of one run of the product's kernel with each choice, measured in turns."""
        ...


@dataclass
class Subject:
    """One product of a model and what is known of it; `tried` counts into `candidates`."""

    product: Product
    calls: int
    candidates: Sequence[Choice]
    choice: Choice | None = None
    speedup: float = 1.0
    tried: int = 0
    seconds: float = 0.0  # of one run as the cost model has it

    @property
    def finding(self) -> Finding:
        return Finding(self.choice, self.tried, self.speedup)

    @property
    def saved(self) -> float:
        """Seconds per run of the model that the choice is worth."""
        return self.calls * self.seconds * (1.0 - 1.0 / self.speedup)

    def lost(self, rate: float) -> float:
        """Seconds per run of the model beyond what `rate` (FLOP per second) would take."""
        return self.calls * max(self.seconds / self.speedup - self.product.flops / rate, 0.0)


@dataclass(frozen=True)
class Progress:
    """How far tuning is. used, budget: seconds. tried: candidates, in all. faster: products that run faster now."""

    used: float
    budget: float
    products: int
    tried: int
    faster: int
    current: str

    @property
    def sentence(self) -> str:
        return f"{self.tried} tiles tried, {self.faster} of {self.products} products faster"


class Search:
    """One run. `found` is told of a subject before each of its candidates is measured, and after one was better."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        measure: Measure,
        clock: Callable[[], float],
        found: Callable[[Subject], Any],
        progress: Callable[[Progress], Any],
    ) -> None:
        self.subjects = sorted(subjects, key=lambda s: -s.calls * s.product.flops)
        self.tried = 0
        self._measure = measure
        self._clock = clock
        self._found = found
        self._progress = progress

    def run(self, seconds: float) -> float:
        """Tries candidates until `seconds` are over or none is left; returns the seconds used.

        They are exceeded by one measurement at most.
        """
        start = self._clock()
        for subject in self.subjects:
            self._tell(subject, start, seconds)
            if self._clock() - start >= seconds:
                break
            (subject.seconds,) = self._measure(subject.product, [None])
        while (used := self._clock() - start) < seconds:
            promising = self._next()
            if promising is None:
                break
            self._tell(promising, start, seconds)
            self._try(promising, lambda: self._clock() - start < seconds)
        return used

    def _next(self) -> Subject | None:
        """The subject whose next candidate promises most."""
        open_ones = [s for s in self.subjects if s.seconds > 0.0 and s.tried < len(s.candidates)]
        if not open_ones:
            return None
        rate = max(s.product.flops * s.speedup / s.seconds for s in self.subjects if s.seconds > 0.0)
        return max(open_ones, key=lambda s: (s.lost(rate) / (1 + s.tried), s.calls * s.seconds))

    def _try(self, subject: Subject, time_left: Callable[[], bool]) -> None:
        candidate = subject.candidates[subject.tried]
        subject.tried += 1
        self.tried += 1
        self._found(subject)  # should the candidate crash this process, the next run goes past it
        if candidate == subject.choice:
            return
        taken, best = self._measure(subject.product, [candidate, subject.choice])
        if taken > best * (1.0 - MARGIN) or not time_left():
            return
        taken, default = self._measure(subject.product, [candidate, None])
        speedup = default / taken
        if speedup * (1.0 - MARGIN) >= 1.0 and speedup > subject.speedup:
            subject.choice, subject.speedup, subject.seconds = candidate, speedup, default
            self._found(subject)

    def _tell(self, subject: Subject, start: float, seconds: float) -> None:
        self._progress(
            Progress(
                used=self._clock() - start,
                budget=seconds,
                products=len(self.subjects),
                tried=self.tried,
                faster=sum(s.choice is not None for s in self.subjects),
                current=str(subject.product),
            )
        )
