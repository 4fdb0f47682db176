"""Contestants in turns, each in a process of its own, within limits of time and memory.

A contestant that fails to load, crashes, takes too long or too much memory leaves its reason in place of its figures;
the others go on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attnrewrite.bench import ROUNDS, Timing
from benchmarks import memory
from benchmarks.worker import Job, write_job

ROOT = Path(__file__).resolve().parents[1]
# Of what is available when the first contestant starts, what one may use.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Limits:
    """load_seconds: until a model has run twice, torch.compile's compilation included. turn_seconds: of one turn."""

    load_seconds: float = 240.0
    turn_seconds: float = 240.0
    memory_bytes: int | None = None

    @property
    def bytes(self) -> int | None:
        if self.memory_bytes is not None:
            return self.memory_bytes
        free = memory.available()
        return None if free is None else int(free * MEMORY_SHARE)


@dataclass
class Outcome:
    """failed: why there are no figures, None where there are. loaded: what the process said of loading.

    difference: of the sampled outputs to those of the first contestant that ran, as a share of max |output|.
    """

    failed: str | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    difference: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Milliseconds and megabytes."""
        if self.failed is not None:
            return {"failed": self.failed}
        figures = Timing.of("", "", self.seconds).to_json()
        document = {key: figures[key] for key in ("median_ms", "min_ms", "p90_ms", "runs")}
        document["load_s"] = round(self.loaded["load_seconds"], 2)
        document |= {
            f"{part}_mb": round(self.loaded[f"{part}_bytes"] / 1e6, 1) for part in ("load", "first", "run", "output")
        }
        if self.difference is not None:
            document["difference"] = float(f"{self.difference:.2g}")
        return document


class Failed(Exception):
    """A contestant is out; the message says why."""


class Contestant:
    """A worker process and what is known of it."""

    def __init__(self, job: Job, folder: Path, limits: Limits) -> None:
        path = folder / "job.json"
        write_job(job, path)
        self._limit_bytes = limits.bytes
        self._errors = (folder / "stderr").open("w+")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        count = str(job.threads)
        settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **settings},
            start_new_session=True,  # torch.compile starts processes of its own, which end with it
            text=True,
        )

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line of the worker. Raises Failed."""
        output = self._process.stdout
        assert output is not None
        deadline = time.monotonic() + seconds
        while not select.select([output], [], [], 0.1)[0]:
            used = memory.resident(self._process.pid)
            if self._limit_bytes is not None and used is not None and used > self._limit_bytes:
                raise Failed(f"needs more than {self._limit_bytes / 1e9:.0f} GB")
            if time.monotonic() > deadline:
                raise Failed(f"took more than {seconds:.0f} s")
        line = output.readline()
        if not line:
            raise Failed(self._last_words())
        document: dict[str, Any] = json.loads(line)
        if "failed" in document:
            raise Failed(document["failed"])
        return document

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each run of one turn. Raises Failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_words()) from None
        taken: list[float] = self.answer(seconds)["seconds"]
        return taken

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        status = self._process.wait(timeout=10)
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return f"ended with status {status}" + (f": {lines[-1][:160]}" if lines else "")


def compete(
    jobs: Mapping[str, Job], *, rounds: int = ROUNDS, limits: Limits | None = None, together: bool = True
) -> dict[str, Outcome]:
    """Outcomes by contestant. together: all are loaded at once and take turns; otherwise one after the other, for
    models of which only one fits into memory.
    """
    limits = limits or Limits()
    outcomes: dict[str, Outcome] = {name: Outcome() for name in jobs}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as home:
        for group in [list(jobs)] if together else [[name] for name in jobs]:
            running: dict[str, Contestant] = {}
            try:
                for name in group:
                    folder = Path(home) / name
                    folder.mkdir()
                    running[name] = Contestant(jobs[name], folder, limits)
                    loaded = _attempt(running, outcomes, name, lambda c: c.answer(limits.load_seconds))
                    outcomes[name].loaded = loaded or {}
                for _ in range(rounds):
                    for name in list(running):
                        taken = _attempt(running, outcomes, name, lambda c: c.turn(limits.turn_seconds))
                        outcomes[name].seconds += taken or []
            finally:
                for contestant in running.values():
                    contestant.stop()
    _compare(jobs, outcomes)
    return outcomes


def _attempt(
    running: dict[str, Contestant], outcomes: dict[str, Outcome], name: str, act: Callable[[Contestant], Any]
) -> Any:
    """What `act` returns; a contestant that fails is stopped and leaves the field with its reason."""
    try:
        return act(running[name])
    except Failed as reason:
        outcomes[name].failed = str(reason)
        running.pop(name).stop()
        return None


def _compare(jobs: Mapping[str, Job], outcomes: Mapping[str, Outcome]) -> None:
    """Fill in the differences of contestants that ran the same model."""
    references: dict[str, np.ndarray] = {}
    for name, job in jobs.items():
        if outcomes[name].failed is not None or not Path(job.sample).exists():
            continue
        found = np.load(job.sample)
        expected = references.setdefault(job.model, found)
        if expected is not found:
            outcomes[name].difference = difference(found, expected)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of max |expected|; inf where shapes differ or a number is missing."""
    if found.shape != expected.shape:
        return float("inf")
    worst = float(np.max(np.abs(found - expected)) / max(float(np.max(np.abs(expected))), 1e-30))
    return worst if np.isfinite(worst) else float("inf")


def best_peer(figures: Mapping[str, Mapping[str, Any]], peers: Sequence[str]) -> float | None:
    """Milliseconds of the fastest contestant among `peers` that has figures."""
    medians = [figures[name]["median_ms"] for name in peers if "median_ms" in figures.get(name, {})]
    return min(medians, default=None)
