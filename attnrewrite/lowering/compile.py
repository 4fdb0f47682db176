"""Compile a rewritten model into a library, in a process of its own.

A fault inside TVM or LLVM ends the process it happens in and cannot be caught, so that process is a child: the caller
gets one sentence, whatever happened. Importing this does not import TVM.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attnrewrite
from attnrewrite.errors import CompilerError, UserError
from attnrewrite.lowering.search import Progress
from attnrewrite.lowering.targets import Target
from attnrewrite.runtime import Manifest, Tensor, Weight, default_threads, tensors_of, weights_of, write_manifest

# TVM's Python interface changes with every release.
TVM_VERSION = "0.27.0.post1"

PRECISIONS = ("fp32", "fp16", "bf16")
_BF16_SINCE = 80  # of CUDA's architectures

REQUEST_NAME = "request.json"
RESULT_NAME = "result.json"

# Bytes of a model's weights from which they stand beside the library. Below, one file is handier, and what loading
# takes for a moment (1 GB at most) any machine has; a phone's app may not, so a library for one never holds them.
SEPARATE_WEIGHTS = 1 << 28

# Of the child's standard error, what is kept as a detail of the error raised.
DETAIL_LINES = 20


@dataclass(frozen=True)
class CompileReport:
    """What one compilation made.

    kernels: functions in the library, attention_kernels: those of the two ops among them. seconds: by stage.
    constant_outputs: names of the outputs that are the same in every run. weights: those in `weights_file`, empty where
    the library holds them itself. beside: names of the files that were made with the library.
    peak_memory_bytes: of the compiling process. tuning: the register tiles that were measured, where any were used;
    `Tiles.to_json` of lowering/tuning.py. replayed_entry: the one that replays its launches as CUDA graphs, if any.
    """

    target: str
    library: str
    entry: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    kernels: int
    attention_kernels: int
    library_bytes: int
    seconds: dict[str, float]
    peak_memory_bytes: int
    versions: dict[str, str]
    constant_outputs: tuple[str, ...] = ()
    weights_file: str | None = None
    weights: tuple[Weight, ...] = ()
    weights_bytes: int = 0
    beside: tuple[str, ...] = ()
    tuning: dict[str, Any] | None = None
    replayed_entry: str | None = None


def compile_model(
    model_path: Path,
    target: Target,
    output_dir: Path,
    *,
    precision: str = "fp32",
    threads: int | None = None,
    source_sha256: str = "",
    tune: float | None = None,
    on_tuning: Callable[[Progress], object] | None = None,
    separate_weights: int | None = None,
    name: str = "model",
) -> CompileReport:
    """Compile an ONNX file (standard operators, and nodes of domain `attnrewrite`) into `output_dir`.

    Writes the library, what goes beside it and manifest.json there, or nothing. precision: what the model computes in;
    inputs and outputs keep their dtypes. threads: what the manifest says to run with; None: all cores. source_sha256:
    for the manifest, of the model before rewriting. tune: seconds to search for faster register tiles on this machine's
    CPU; None: only use what earlier runs found, 0: do not. on_tuning: told how far the search is. separate_weights:
    bytes of weights from which they go into a file of their own; None: SEPARATE_WEIGHTS, and always for an app. name:
    of the model, by which a library that is linked into an app calls its functions.

    Raises CompilerError, with the compiler's last words as a note, and UserError for a precision that is not known
    or that the target does not have.
    """
    check_precision(precision, target)
    check_tvm_version()
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".compile-") as folder:
        work = Path(folder)
        request = {
            "model": str(model_path.resolve()),
            "target": target.to_json(),
            "precision": precision,
            "tune": tune,
            "threads": threads or default_threads(),
            "separate_weights": _separate_weights(target) if separate_weights is None else separate_weights,
            "name": c_name(name),
        }
        (work / REQUEST_NAME).write_text(json.dumps(request), encoding="utf-8")
        note = None
        try:
            run_child(work, f"{model_path.name} for {target.name}", on_tuning)
        except CompilerCrash as crash:
            if not tune:
                raise
            # A kernel under trial ran into something this machine cannot do. What was found before it is kept.
            (work / REQUEST_NAME).write_text(json.dumps(request | {"tune": None}), encoding="utf-8")
            run_child(work, f"{model_path.name} for {target.name}")
            note = f"tuning ended early: {crash}"
        report = _report(json.loads((work / RESULT_NAME).read_text(encoding="utf-8")), target)
        if note is not None:
            report = replace(report, tuning=_with_note(report.tuning, note))
        for file in (report.library, *report.beside):
            shutil.move(work / file, output_dir / file)
    manifest = Manifest(
        target=target.name,
        device=target.device,
        library=report.library,
        entry=report.entry,
        inputs=report.inputs,
        outputs=report.outputs,
        versions=report.versions,
        source_sha256=source_sha256,
        threads=threads,
        constant_outputs=tuple(report.constant_outputs),
        precision=precision,
        weights_file=report.weights_file,
        weights=report.weights,
        replayed_entry=report.replayed_entry,
    )
    write_manifest(output_dir, manifest)
    return report


def _separate_weights(target: Target) -> int:
    return 0 if target.is_linked_in else SEPARATE_WEIGHTS


def c_name(name: str) -> str:
    """What the C functions of a model begin with: "Swin-B.v2" -> "swin_b_v2"."""
    plain = re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")
    return plain if plain[:1].isalpha() else f"model_{plain}".rstrip("_")


def check_precision(precision: str, target: Target | None) -> None:
    """Raises UserError for a precision that is not known, or that no target of this kind has."""
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
    if precision != "bf16" or target is None or target.kind == "cpu":
        return
    if target.kind != "cuda":
        raise UserError(f"precision bf16 is for x86 CPUs and CUDA; target {target.name} has fp32 and fp16")
    oldest = target.architectures[0]
    if int(oldest.removeprefix("sm_")) < _BF16_SINCE:
        raise UserError(
            f"precision bf16 is for CUDA from sm_{_BF16_SINCE} on; target {target.name} begins with {oldest}"
        )


def check_tvm_version() -> None:
    """Raises CompilerError unless the installed TVM is the one this package is written for."""
    try:
        installed = importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        raise CompilerError(
            f"compiling needs apache-tvm {TVM_VERSION}: pip install apache-tvm=={TVM_VERSION}"
        ) from None
    if installed != TVM_VERSION:
        raise CompilerError(
            f"compiling needs apache-tvm {TVM_VERSION}, found {installed}: pip install apache-tvm=={TVM_VERSION}"
        )


def versions() -> dict[str, str]:
    """Of what a library is made by and runs on."""
    return {"attnrewrite": attnrewrite.__version__, "apache-tvm": TVM_VERSION}


class CompilerCrash(CompilerError):
    """The compiling process was ended by a signal."""


def run_child(
    work: Path,
    what: str,
    on_tuning: Callable[[Progress], object] | None = None,
    on_start: Callable[[subprocess.Popen[str]], object] | None = None,
) -> None:
    """Let a compiling process answer the request in `work`. Raises CompilerError unless it left a result.

    what: is compiled, for the error. on_start: is given the process, which may be ended.
    """
    package_root = str(Path(attnrewrite.__file__).resolve().parents[1])
    path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with (work / "diagnostics.txt").open("w+", encoding="utf-8", errors="replace") as diagnostics:
        with subprocess.Popen(
            [sys.executable, "-m", "attnrewrite.lowering.child", str(work)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=diagnostics,
            text=True,
        ) as child:
            if on_start is not None:
                on_start(child)
            try:
                for line in child.stdout or ():
                    if on_tuning is not None:
                        on_tuning(Progress(**json.loads(line)))
            except BaseException:
                child.kill()
                raise
        diagnostics.seek(0)
        tail = diagnostics.read().strip().splitlines()[-DETAIL_LINES:]
    result = work / RESULT_NAME
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if child.returncode == 0 and "error" not in answer:
        return
    if answer.get("usage"):
        raise UserError(answer["error"])
    if "error" in answer:
        error = CompilerError(f"compiling {what} failed: {answer['error']}")
    elif child.returncode < 0:
        error = CompilerCrash(f"the compiler crashed ({_signal_name(-child.returncode)}) while compiling {what}")
    else:
        error = CompilerError(f"the compiler stopped with exit code {child.returncode} while compiling {what}")
    if tail:
        error.add_note("\n".join(tail))
    raise error


def _with_note(tuning: dict[str, Any] | None, note: str) -> dict[str, Any]:
    tuning = tuning or {}
    return {**tuning, "notes": [note, *tuning.get("notes", [])]}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _report(result: dict[str, Any], target: Target) -> CompileReport:
    inputs, outputs = (tensors_of(result.pop(key)) for key in ("inputs", "outputs"))
    weights = weights_of(result.pop("weights"))
    return CompileReport(
        target=target.name,
        weights=weights,
        beside=tuple(result.pop("beside")),
        library=target.library,
        inputs=inputs,
        outputs=outputs,
        versions=versions(),
        **result,
    )
