"""One contestant in a process of its own: `python -m benchmarks.worker JOB.json`, driven through its standard input.

It loads the model, runs it twice and says so in one line of JSON; then, for every line it is sent, it takes a turn
(`attnrewrite.bench.block`) and answers with the seconds of each run. A process each keeps the thread pools, the peak
memory and the crashes of the contestants apart.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from attnrewrite import bench, runtime
from attnrewrite.verify.runners import CompiledRunner, OnnxRunner, OpenVinoRunner, Runner
from benchmarks import memory

# Elements of the outputs that are kept for comparison.
SAMPLE = 1 << 18


@dataclass(frozen=True)
class Job:
    """kind: a key of `LOADERS`. model: name in the zoo (torch builds it), or of what is measured. onnx: the original.

    artifact: a directory written by optimize. inputs: an .npz file, its arrays by input name. sample: where some of the
    first outputs go. aligned: inputs lie where the compiled model reads them without copying.
    clock: a key of `CLOCKS`.
    """

    kind: str
    model: str
    onnx: str
    artifact: str
    inputs: str
    sample: str
    threads: int
    block_seconds: float = bench.BLOCK_SECONDS
    aligned: bool = False
    clock: str = "wall"


class TorchRunner:
    """A module of the zoo in PyTorch, as it is or rewritten; inputs in the order of the file.

    backend: of torch.compile; None runs eagerly.
    """

    def __init__(self, job: Job, *, rewritten: bool = False, backend: str | None = None) -> None:
        import torch

        from benchmarks import zoo

        torch.set_num_threads(job.threads)
        self._torch = torch
        module = zoo.model(job.model).module()
        if rewritten:
            import attnrewrite

            with np.load(job.inputs) as file, torch.no_grad():
                inputs = [torch.from_numpy(file[name]) for name in file.files]
                module = attnrewrite.optimize(module, inputs, verify=False).module
        self._module = module if backend is None else torch.compile(module, backend=backend)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._torch.inference_mode():
            return {"y": self._module(*(self._torch.from_numpy(array) for array in inputs.values())).numpy()}


# The CPU clock leaves out what other processes took, and counts the waiting of a thread pool's threads.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LOADERS: dict[str, Callable[[Job], Runner]] = {
    "onnxruntime": lambda job: OnnxRunner(Path(job.onnx), job.threads),
    "openvino": lambda job: OpenVinoRunner(Path(job.onnx), job.threads),
    "torch": TorchRunner,
    "torch-compile": partial(TorchRunner, backend="inductor"),
    "torch-rewritten": partial(TorchRunner, rewritten=True),
    "torch-attnrewrite": partial(TorchRunner, backend="attnrewrite"),
    "rewritten": lambda job: OnnxRunner(Path(job.artifact) / "model.onnx", job.threads),
    "compiled": lambda job: CompiledRunner(Path(job.artifact), job.threads),
}
ENGINES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "torch": "torch",
    "torch-compile": "torch",
    "torch-rewritten": "torch",
    "torch-attnrewrite": "torch",
    "rewritten": "onnxruntime",
    "compiled": "tvm.relax",
}


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    # What an engine prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    bench.BLOCK_SECONDS = job.block_seconds
    _pin(job.threads)
    try:
        __import__(ENGINES[job.kind])
        with np.load(job.inputs) as file:
            inputs = {name: _aligned(file[name]) if job.aligned else file[name] for name in file.files}
        runner = _loaded(job, inputs, answers)
        for _ in sys.stdin:
            _answer(answers, {"seconds": bench.block(runner, inputs, CLOCKS[job.clock])})
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        _answer(answers, {"failed": f"{type(error).__name__}: {lines[0]}"[:200]})


def _loaded(job: Job, inputs: dict[str, np.ndarray], answers: TextIO) -> Runner:
    """The runner, after two runs: the first with everything an engine does late, the second as all that follow."""
    memory.reset_peak()
    before = memory.resident() or 0
    start = time.perf_counter()
    runner: Runner = LOADERS[job.kind](job)
    loading = memory.resident(peak=True) or 0
    memory.reset_peak()
    outputs = list(runner.run(inputs).values())
    seconds = time.perf_counter() - start
    first = memory.resident(peak=True) or 0
    _write_sample(outputs, Path(job.sample))
    size = sum(array.nbytes for array in outputs)
    del outputs
    memory.reset_peak()
    runner.run(inputs)
    later = memory.resident(peak=True) or 0
    peaks = {"load": max(loading, first), "first": first, "run": later}
    figures = {f"{part}_bytes": peak - before for part, peak in peaks.items()}
    _answer(answers, {"load_seconds": seconds, **figures, "output_bytes": size})
    return runner


def _write_sample(outputs: list[np.ndarray], path: Path) -> None:
    """Evenly spaced elements of all outputs, float64."""
    step = max(1, sum(array.size for array in outputs) // SAMPLE)
    np.save(path, np.concatenate([array.reshape(-1)[::step].astype(np.float64) for array in outputs]))


def _aligned(array: np.ndarray) -> np.ndarray:
    copy = runtime.empty_aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def _pin(threads: int) -> None:
    """Keep the process on as many cores as it has threads: the last ones, for the first serve interrupts."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def _answer(answers: TextIO, document: dict[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


def write_job(job: Job, path: Path) -> None:
    path.write_text(json.dumps(asdict(job)))


if __name__ == "__main__":
    main()
