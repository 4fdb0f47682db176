"""Timing an artifact against the model it came from, on the machine at hand.

The contestants take turns in blocks, so that a machine that slows down slows all of them, and the first run of a block
is not counted: it finds the caches full of somebody else's data, which does not matter to a run of a second or more.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attnrewrite import artifact
from attnrewrite.errors import UserError
from attnrewrite.verify.inputs import interface, make_inputs, resolve_shapes
from attnrewrite.verify.runners import CompiledRunner, OnnxRunner, OpenVinoRunner, Runner, RunnerError

# The original in ONNX Runtime, the rewritten model in ONNX Runtime, the original in OpenVINO.
PEERS = ("original", "onnxruntime", "openvino")
ROUNDS = 4
BLOCK_SECONDS = 1.0
LONG_RUN_SECONDS = 1.0
MIN_RUNS_PER_BLOCK = 2
MAX_RUNS_PER_BLOCK = 200


@dataclass(frozen=True)
class Contestant:
    """name: original, rewritten, compiled, or openvino (the original there). engine: what runs it."""

    name: str
    engine: str
    load: Callable[[], Runner]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run at batch 1 where the batch is symbolic."""

    name: str
    engine: str
    median_ms: float
    min_ms: float
    p90_ms: float
    runs: int

    @classmethod
    def of(cls, name: str, engine: str, seconds: Sequence[float]) -> Timing:
        """From the seconds of every run counted, at least one."""
        quantile = float(np.quantile(seconds, 0.9))
        return cls(name, engine, 1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * quantile, len(seconds))

    def to_json(self) -> dict[str, Any]:
        numbers = {key: round(getattr(self, key), 4) for key in ("median_ms", "min_ms", "p90_ms")}
        return {"name": self.name, "engine": self.engine, **numbers, "runs": self.runs}


def contestants(
    directory: Path,
    against: Sequence[str],
    original: Path | None,
    threads: int | None,
    cuda_graph: bool = True,
    device: int = 0,
) -> list[Contestant]:
    """Who takes part: the library, where this machine can run it, and the peers asked for.

    original: the model the artifact was made from; looked for beside the artifact where None. cuda_graph: whether a
    CUDA library may replay its launches. device: which GPU a library runs on.
    Raises UserError for an unknown peer, for one that is not installed, and where the original is asked for and not
    found.
    """
    unknown = [name for name in against if name not in PEERS]
    if unknown:
        raise UserError(f"--against: there is no peer {unknown[0]!r}; the peers are {', '.join(PEERS)}")
    if "openvino" in against and importlib.util.find_spec("openvino") is None:
        raise UserError("--against openvino needs OpenVINO, which is not installed: pip install openvino")
    report, document = artifact.read_report(directory)
    chosen = []
    if "original" in against or "openvino" in against:
        path = original or find_original(directory, report.model, document.get("source_sha256"))
    if "original" in against:
        chosen.append(Contestant("original", "ONNX Runtime", lambda: OnnxRunner(path, threads)))
    if "openvino" in against:
        chosen.append(Contestant("openvino", "OpenVINO", lambda: OpenVinoRunner(path, threads)))
    if "onnxruntime" in against:
        rewritten = directory / artifact.MODEL_NAME
        chosen.append(Contestant("rewritten", "ONNX Runtime", lambda: OnnxRunner(rewritten, threads)))
    if artifact.runs_here(report):
        library = partial(CompiledRunner, directory, threads, cuda_graph, device)
        chosen.append(Contestant("compiled", "attnrewrite", library))
    if not chosen:
        raise UserError(f"{directory} holds nothing that runs on this machine, and --against names nothing")
    return chosen


def find_original(directory: Path, model: str, sha256: str | None) -> Path:
    """The file an artifact was made from, known by its hash: where the report says, or beside the artifact."""
    for candidate in (Path(model), directory.resolve().parent / Path(model).name):
        if candidate.is_file() and artifact.sha256_of(candidate) == sha256:
            return candidate
    raise UserError(
        f"the original of {directory}, {model}, is not there any more or has changed: "
        "put it beside the directory, or leave `original` out of --against"
    )


def measure(entries: Sequence[Contestant], inputs: Mapping[str, np.ndarray]) -> list[Timing]:
    """Time every contestant on the same inputs. Raises UserError where one does not run."""
    runners: list[Runner] = []
    samples: list[list[float]] = [[] for _ in entries]
    for entry in entries:
        try:
            runners.append(entry.load())
            runners[-1].run(inputs)
        except RunnerError as error:
            raise UserError(f"the {entry.name} model does not run: {error}") from error
    for _ in range(ROUNDS):
        for runner, taken in zip(runners, samples, strict=True):
            taken += block(runner, inputs)
    return [Timing.of(e.name, e.engine, taken) for e, taken in zip(entries, samples, strict=True)]


def example_inputs(model: Path) -> dict[str, np.ndarray]:
    """Random inputs for a model; batch 1 where the batch is symbolic."""
    inputs = interface(model).inputs
    return make_inputs(inputs, resolve_shapes(inputs, {}, batch=1), "random", np.random.default_rng(0))


def gains(timings: Sequence[Timing], threads: int | None) -> dict[str, Any]:
    """The `gains` of a report: timings, and how many times faster than the original each of the others is."""
    base = next((t for t in timings if t.name == "original"), None)
    document: dict[str, Any] = {"threads": threads, "timings": [t.to_json() for t in timings]}
    if base is not None:
        document["speedup"] = {t.name: round(base.median_ms / t.median_ms, 3) for t in timings if t is not base}
    return document


def block(
    runner: Runner, inputs: Mapping[str, np.ndarray], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of each run of one contestant's turn that counts, by a clock in seconds."""
    taken = [_seconds(runner, inputs, clock)]
    if taken[0] >= LONG_RUN_SECONDS:
        return taken
    taken.clear()
    while len(taken) < MIN_RUNS_PER_BLOCK or (sum(taken) < BLOCK_SECONDS and len(taken) < MAX_RUNS_PER_BLOCK):
        taken.append(_seconds(runner, inputs, clock))
    return taken


def _seconds(runner: Runner, inputs: Mapping[str, np.ndarray], clock: Callable[[], float]) -> float:
    start = clock()
    runner.run(inputs)
    return clock() - start
