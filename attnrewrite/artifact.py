"""The way from a model file to an artifact directory: read, rewrite, write, verify, compile, report.

The command line and the Python interface both go it; they differ in where the directory stands meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import attnrewrite
from attnrewrite.atomic import GENERATOR
from attnrewrite.errors import CompilerError, UserError
from attnrewrite.frontend.pt2 import as_onnx
from attnrewrite.report import Report

if TYPE_CHECKING:
    from attnrewrite.graph import Graph
    from attnrewrite.localattention.site import Site
    from attnrewrite.lowering.search import Progress
    from attnrewrite.lowering.targets import Target
    from attnrewrite.pipeline import Outcome, Pass, Pipeline
    from attnrewrite.verify.numeric import Precision, Verification
    from attnrewrite.verify.runners import Runner

MODEL_NAME = "model.onnx"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
README_NAME = "README.md"

InputShapes = Mapping[str, Sequence[int | str]]
Passes = Sequence["Pass | str"]


@dataclass(frozen=True)
class Options:
    """What `optimize` is asked to do. target None: rewrite only. tvm_target: a TVM target as JSON text.

    tune: seconds to measure register tiles; None: use what was measured before, 0: do not.
    """

    target: str | None = None
    passes: Passes | Pipeline | None = None
    precision: str = "fp32"
    compile: bool = True
    inline: bool = False
    verify: bool = True
    input_shapes: InputShapes = field(default_factory=dict)
    threads: int | None = None
    tvm_target: str | None = None
    tune: float | None = None


@dataclass(frozen=True)
class Built:
    """What stands in the directory. compiler_error: why it holds no library though one was asked for."""

    report: Report
    verification: Verification | None
    compiler_error: CompilerError | None


class Stages:
    """Wall time of the stages, by name, and a word to the user as each begins; parts of one stage say it once."""

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._said: str | None = None

    @contextlib.contextmanager
    def stage(self, name: str, sentence: str) -> Iterator[None]:
        if self._progress is not None and sentence != self._said:
            self._progress(sentence)
            self._said = sentence
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def check_model_path(path: Path) -> None:
    """Raises UserError for what is no model file by its kind; the frontend says the rest."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a directory, not an ONNX file")


def pipeline_of(passes: Passes | Pipeline | None) -> Pipeline:
    """The pipeline of the named (or given) passes, in the order given; None stands for all of them.

    Raises UserError for an unknown name.
    """
    from attnrewrite.pipeline import Pipeline, select

    if passes is None or isinstance(passes, Pipeline):
        return passes or select()
    return Pipeline([p for entry in passes for p in (select([entry]).passes if isinstance(entry, str) else (entry,))])


def rewrite(
    source: Path,
    pipeline: Pipeline,
    input_shapes: InputShapes,
    stages: Stages,
    on_pass: Callable[[str, Graph], None] | None = None,
) -> Outcome:
    """Read a model and run the passes over it."""
    from attnrewrite.frontend.onnx import read

    with stages.stage("read", f"reading {source.name}"):
        graph = read(source, input_shapes or None)
    with stages.stage("rewrite", "looking for local attention"):
        return pipeline.run(graph, on_pass=on_pass)


def with_readings(source: Path, sites: Sequence[Site], input_shapes: InputShapes) -> tuple[Site, ...]:
    """The sites with what a few of their queries read in the model as it came (branches folded)."""
    from attnrewrite.facts import Facts
    from attnrewrite.frontend.onnx import read
    from attnrewrite.localattention.explain import readings
    from attnrewrite.pipeline import select

    graph = select(["fold-reparam-branches"]).run(read(source, input_shapes or None)).graph
    facts = Facts(graph)
    softmaxes = {node.label: node for node in graph.nodes if node.op == "Softmax"}
    return tuple(
        replace(site, readings=readings(facts, softmaxes[site.node], site)) if site.node in softmaxes else site
        for site in sites
    )


def report_of(model: str, outcome: Outcome, stages: Stages) -> Report:
    return Report(
        model=model,
        sites=tuple(outcome.sites),
        reparam=tuple(outcome.reparam),
        nodes_before=outcome.nodes_before,
        nodes_after=outcome.nodes_after,
        passes=dict(outcome.seconds),
        seconds=dict(stages.seconds),
    )


def build(
    source: Path,
    directory: Path,
    options: Options,
    *,
    name: str | None = None,
    on_pass: Callable[[str, Graph], None] | None = None,
    progress: Callable[[str], None] | None = None,
    on_tuning: Callable[[Progress], object] | None = None,
) -> Built:
    """Fill an existing, empty directory with model.onnx, the compiled library, manifest.json and the reports.

    name: how the report calls the model; the path of `source` otherwise. A wrong result does not raise: the caller
    looks at `Built.verification`; nor does a failed compiler: what was built before it is whole. on_tuning: told how
    far the measuring of tiles is.
    Raises UserError for bad input.
    """
    target = check_options(options)
    stages = Stages(progress)
    with contextlib.ExitStack() as stack:
        with stages.stage("read", f"reading {source.name}"):
            model = stack.enter_context(as_onnx(source))
        return _build(model, source, directory, target, options, stages, name, on_pass, on_tuning)


def _build(
    source: Path,
    given: Path,
    directory: Path,
    target: Target | None,
    options: Options,
    stages: Stages,
    name: str | None,
    on_pass: Callable[[str, Graph], None] | None,
    on_tuning: Callable[[Progress], object] | None,
) -> Built:
    """source: an ONNX file. given: the file that the user named, which `source` may have been exported from."""
    from attnrewrite.frontend.onnx import copy_model, write

    pipeline = pipeline_of(options.passes)
    rewritten = directory / MODEL_NAME

    outcome = rewrite(source, pipeline, options.input_shapes, stages, on_pass)
    lowered = rewritten
    changed = outcome.modified or bool(options.input_shapes)
    with stages.stage("write", "writing the rewritten model"):
        if changed:
            write(outcome.graph, rewritten, inline=options.inline)
        elif options.compile and target is not None:  # compiled from its folded form
            lowered = directory / f"folded-{MODEL_NAME}"
            write(outcome.graph, lowered)
    report = report_of(name or str(given), outcome, stages)
    del outcome
    gc.collect()  # the graph holds the weights, and its values and nodes hold each other
    if not changed:  # nothing was rewritten: the model is delivered as it came
        with stages.stage("write", "copying the model"):
            copy_model(source, rewritten)
    report = replace(
        report,
        target=target.name if target is not None else None,
        precision=options.precision if options.compile and target is not None else None,
    )

    source_sha256 = sha256_of(given)
    compiler_error: CompilerError | None = None
    if options.compile and target is not None:
        with stages.stage("compile", f"compiling for {options.target}"):
            try:
                compiled = _compile(lowered, target, directory, options, source_sha256, on_tuning, given.stem)
                report = replace(report, compile=compiled)
            except CompilerError as error:
                compiler_error = error
                report = replace(report, compile={"target": target.name, "error": str(error)})

    if lowered is not rewritten:
        for file in directory.glob(f"{lowered.name}*"):
            file.unlink()
    verification = None
    if options.verify:
        with stages.stage("verify", "verifying"):
            verification = verify(source, rewritten, options, report)
        report = replace(report, verification=verification.to_json())
    report = replace(report, seconds=dict(stages.seconds))
    write_reports(report, directory, source_sha256)
    return Built(report, verification, compiler_error)


def verify(
    source: Path,
    rewritten: Path,
    options: Options,
    report: Report | None = None,
    *,
    trials: int = 3,
    emulate: Collection[str] = (),
) -> Verification:
    """Exact and numeric verification of a rewritten model and, where this machine can run it, of its library.

    report: of the artifact that the rewritten model is part of. emulate: kinds of target whose emulator may take its
    time (see `library_runner`); otherwise it is used where it is at hand, for one run.
    """
    from attnrewrite.verify.libraries import kind_of, library_runner
    from attnrewrite.verify.numeric import verify_models

    exact = _verify_exact(source, rewritten, options.input_shapes)
    load: Callable[[], Runner] | str | None = None
    at_length = False
    if report is not None and has_library(report):
        target = report.target or ""
        load = library_runner(target, rewritten.parent, options.threads, emulate)
        at_length = runs_here(report) or kind_of(target) in emulate
    precision: Precision = "fp32"
    if report is not None and report.precision == "bf16":
        precision = "bf16-stored" if kind_of(report.target or "") == "cuda" else "bf16"
    elif report is not None and report.precision == "fp16":
        precision = "fp16"
    verification = verify_models(
        source,
        rewritten,
        trials=trials,
        compiled=load if callable(load) else None,
        compiled_precision=precision,
        compiled_trials=None if at_length else 1,
        input_shapes=options.input_shapes,
        threads=options.threads,
    )
    notes = (*verification.notes, *([load] if isinstance(load, str) else []))
    return replace(verification, exact=exact, notes=notes)


def _verify_exact(source: Path, rewritten: Path, input_shapes: InputShapes) -> tuple[dict[str, Any], ...]:
    """One entry per op of ours in the rewritten model; none where it was written out as standard operators."""
    from attnrewrite.frontend.onnx import read
    from attnrewrite.verify.exact import verify_exact
    from attnrewrite.verify.inputs import interface

    before = {spec.name: spec.shape for spec in interface(source).inputs}
    specialised = {
        spec.name: spec.shape
        for spec in interface(rewritten).inputs
        if spec.name in before and any(isinstance(e, int) for e in set(spec.shape) - set(before[spec.name]))
    }
    original = read(source, {**specialised, **input_shapes} or None)
    checks = tuple(check.to_json() for check in verify_exact(original, read(rewritten)))
    del original
    gc.collect()
    return checks


def verify_artifact(
    original: Path,
    rewritten: Path,
    *,
    trials: int,
    input_shapes: InputShapes,
    threads: int | None,
    emulate_metal: bool = False,
) -> Verification:
    """Verify a rewritten model, or an artifact directory with its library, against the original file.

    emulate_metal: run a library for Metal on the CPU. Raises UserError where there is none to run.
    """
    from attnrewrite.verify.libraries import is_emulated_metal

    options = Options(input_shapes=input_shapes, threads=threads)
    if rewritten.is_dir():
        report, _ = read_report(rewritten)
        if emulate_metal and not (has_library(report) and is_emulated_metal(report.target or "")):
            raise UserError(f"--emulate runs dynamic libraries for metal, and {rewritten} holds none")
        emulate = ("arm", "metal") if emulate_metal else ("arm",)
        with as_onnx(original) as source:
            return verify(source, rewritten / MODEL_NAME, options, report, trials=trials, emulate=emulate)
    if emulate_metal:
        raise UserError(f"--emulate takes an output of optimize for metal, and {rewritten} is a file")
    check_model_path(rewritten)
    with as_onnx(original) as source, as_onnx(rewritten) as after:
        return verify(source, after, options, trials=trials)


def runner_of(directory: Path, threads: int | None, cuda_graph: bool = True, device: int = 0) -> Runner:
    """The library of an artifact, or its rewritten model in ONNX Runtime, on the CPU, where it has none.

    cuda_graph: whether a CUDA library may replay its launches. device: which GPU a library runs on.

    Raises UserError where the directory is no artifact or does not load on this machine.
    """
    from attnrewrite.verify.runners import CompiledRunner, OnnxRunner, RunnerError

    report, _ = read_report(directory)
    try:
        if has_library(report):
            return CompiledRunner(directory, threads, cuda_graph, device)
        return OnnxRunner(directory / MODEL_NAME, threads)
    except RunnerError as error:
        raise UserError(f"{directory} does not load on this machine: {error}") from error


def run_once(runner: Runner, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Raises UserError where the model refuses the inputs."""
    from attnrewrite.verify.runners import RunnerError

    try:
        return runner.run(inputs)
    except RunnerError as error:
        raise UserError(f"the model does not run on these inputs: {error}") from error


def write_reports(report: Report, directory: Path, source_sha256: str) -> None:
    """report.json, report.html and README.md. The first also names every file, by which a later run knows them."""
    from attnrewrite.report.html import to_html
    from attnrewrite.report.readme import readme_of

    (directory / PAGE_NAME).write_text(to_html(report), encoding="utf-8")
    readme = readme_of(report, directory, directory / MODEL_NAME)
    (directory / README_NAME).write_text(readme, encoding="utf-8")
    origin = {"source_sha256": source_sha256, "generator": GENERATOR, "version": attnrewrite.__version__}
    _write_document(report.to_json() | origin, directory)


def name_files(directory: Path) -> None:
    """Let report.json name what stands in the directory now. Raises UserError where there is no report."""
    _write_document(read_report(directory)[1], directory)


def _write_document(document: dict[str, Any], directory: Path) -> None:
    document["files"] = sorted(path.name for path in directory.iterdir() if path.name != REPORT_NAME)
    (directory / REPORT_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_report(directory: Path) -> tuple[Report, dict[str, Any]]:
    """The report of an artifact directory and the document it was read from. Raises UserError where there is none."""
    path = directory / REPORT_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Report.from_json(document), document
    except OSError as error:
        raise UserError(f"{directory} holds no {REPORT_NAME}: it is not an output of optimize") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_library(report: Report) -> bool:
    """Whether the report is of an artifact with a compiled library."""
    return report.compile is not None and "error" not in report.compile


def runs_here(report: Report) -> bool:
    """Whether the report is of a library that this machine can run."""
    from attnrewrite.verify.libraries import runs_here as target_runs_here

    return has_library(report) and target_runs_here(report.target or "")


def default_directory(model: Path, target: str) -> Path:
    """Beside the input: swin.onnx for cuda:sm_90 gives swin-cuda-sm_90."""
    return model.with_name(f"{model.stem}-{target.replace(':', '-')}")


def check_options(options: Options) -> Target | None:
    """The target as lowering knows it, None where none is asked for. Raises UserError for options that mean nothing."""
    from attnrewrite.lowering.compile import check_precision
    from attnrewrite.lowering.targets import parse_target

    check_precision(options.precision, None)
    pipeline_of(options.passes)
    if options.target is None:
        if options.tvm_target is not None:
            raise UserError("--tvm-target changes a target: name one with --target")
        if options.tune is not None:
            raise UserError("--tune measures compiled kernels: name a target with --target cpu")
        return None
    target = parse_target(options.target, options.tvm_target)
    check_precision(options.precision, target)
    if options.tune is not None:
        _check_tuning(options.tune, target, options.compile)
    return target


def _check_tuning(seconds: float, target: Target, compiles: bool) -> None:
    """Raises UserError where there is nothing to measure, or not on this machine."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UserError(f"--tune takes a number of seconds, got {seconds:g}")
    if target.kind != "cpu":
        raise UserError(
            f"--tune runs kernels on this machine's CPU, so it goes with --target cpu only, got {target.name}"
        )
    if not compiles:
        raise UserError("--tune measures compiled kernels, so it cannot go with --no-compile")


def _compile(
    rewritten: Path,
    target: Target,
    directory: Path,
    options: Options,
    source_sha256: str,
    on_tuning: Callable[[Progress], object] | None,
    name: str,
) -> dict[str, Any]:
    """Compile into the directory; what the report says of it. Raises CompilerError."""
    from attnrewrite.lowering.compile import compile_model

    start = time.perf_counter()
    compiled = compile_model(
        rewritten,
        target,
        directory,
        precision=options.precision,
        threads=options.threads,
        source_sha256=source_sha256,
        tune=options.tune,
        on_tuning=on_tuning,
        name=name,
    )
    document = {
        "target": compiled.target,
        "library": compiled.library,
        "bytes": compiled.library_bytes,
        "weights_bytes": compiled.weights_bytes,
        "seconds": round(time.perf_counter() - start, 3),
        "stages": compiled.seconds,
        "kernels": compiled.kernels,
        "attention_kernels": compiled.attention_kernels,
        "peak_memory_bytes": compiled.peak_memory_bytes,
        "versions": compiled.versions,
    }
    return document if compiled.tuning is None else document | {"tuning": compiled.tuning}
