"""Everything a contest needs in files: the exported model, its inputs and the artifact made from it.

In a folder that is kept, exports are made once, artifacts once per state of the package's source.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attnrewrite import bench
from benchmarks import machine
from benchmarks.contest import ROOT
from benchmarks.worker import Job

EXPORT_SECONDS = 900
OPTIMIZE_SECONDS = 900


class Unavailable(Exception):
    """A file that could not be made; the message says why."""


class Workshop:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.resolve()

    def model(self, name: str) -> Path:
        """The ONNX file of a model of the zoo. Raises Unavailable where it cannot be exported."""
        command = [sys.executable, "-m", "benchmarks.zoo", name]
        return self._made(f"{name}.onnx", lambda path: _run([*command, str(path)], EXPORT_SECONDS))

    def gemm(self, rows: int, columns: int) -> Path:
        name = machine.gemm_name(rows, columns)
        return self._made(f"{name}.onnx", lambda path: machine.write_gemm(rows, columns, path))

    def inputs(self, model: Path) -> Path:
        """Random inputs of an ONNX file, by name."""
        return self._made(f"{model.stem}.npz", lambda path: np.savez(path, **bench.example_inputs(model)))

    def artifact(self, model: Path, *, compiled: bool = True) -> tuple[Path, dict[str, Any]]:
        """The directory `optimize` writes, and its figures: seconds, library_mb, weights_mb. Raises Unavailable."""
        what = "cpu" if compiled else "rewritten"
        directory = self._folder / f"{model.stem}-{what}-{source_digest()}"
        figures = directory.with_suffix(".json")
        if not figures.exists():
            command = [sys.executable, "-m", "attnrewrite", "optimize", str(model), "--no-verify", "-o", str(directory)]
            start = time.perf_counter()
            _run([*command, *(["--target", "cpu", "--tune", "0"] if compiled else ["--no-compile"])], OPTIMIZE_SECONDS)
            document = {"seconds": round(time.perf_counter() - start, 1)}
            if compiled:
                library = next(p for p in directory.iterdir() if p.suffix in (".so", ".dylib"))
                document["library_mb"] = round(library.stat().st_size / 1e6, 2)
                document["weights_mb"] = round(model.stat().st_size / 1e6, 2)
            figures.write_text(json.dumps(document))
        return directory, json.loads(figures.read_text())

    def job(
        self, kind: str, model: Path, threads: int, artifact: Path | None, block_seconds: float, clock: str = "wall"
    ) -> Job:
        """A contestant on a model of this workshop."""
        sample = self._folder / f"{model.stem}-{kind}-{threads}.npy"
        sample.unlink(missing_ok=True)
        paths = [str(path) for path in (model, artifact or "", self.inputs(model), sample)]
        return Job(kind, model.stem, *paths, threads=threads, block_seconds=block_seconds, clock=clock)

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The file of that name, made where it is not there yet; whole or not at all."""
        path = self._folder / name
        if not path.exists():
            unfinished = path.with_name(f"unfinished-{name}")
            make(unfinished)
            unfinished.rename(path)
        return path


def _run(command: list[str], seconds: float) -> None:
    """Raises Unavailable with the command's last line where it fails or takes too long."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"took more than {seconds:.0f} s") from None
    if run.returncode:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        raise Unavailable(lines[-1][:200] if lines else f"ended with status {run.returncode}")


@functools.cache
def source_digest() -> str:
    """Of the Python files that have a part in an artifact: another digest means that artifacts may differ."""
    digest = hashlib.sha256()
    sources = {*ROOT.glob("attnrewrite/**/*.py"), *ROOT.glob("passes/*.py")}
    for path in sorted(sources - {ROOT / "attnrewrite" / name for name in ("bench.py", "cli.py")}):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
