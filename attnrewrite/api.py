"""The Python interface: the command line's verbs as functions on paths, models and arrays.

result = attnrewrite.optimize("swin.onnx", target="cpu")
result.save("out/")
outputs = result.run({"x": image})
model = attnrewrite.load("out/")
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np

from attnrewrite import artifact
from attnrewrite.artifact import InputShapes, Options, Passes
from attnrewrite.atomic import staged_directory
from attnrewrite.errors import UserError
from attnrewrite.frontend.pt2 import SINGLE_FILE_BYTES, as_onnx
from attnrewrite.localattention.site import Site
from attnrewrite.report import Report

if TYPE_CHECKING:
    import onnx
    import torch
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from attnrewrite.graph import Graph
    from attnrewrite.modules import Given
    from attnrewrite.pipeline import Pipeline
    from attnrewrite.runtime import LoadedModel
    from attnrewrite.verify.numeric import Verification

    ModelLike = str | os.PathLike[str] | onnx.ModelProto


class Result:
    """A rewritten, verified and perhaps compiled model. Its files live in a temporary directory until saved.

    report: what was found and done. verification: None where it was not asked for.
    """

    def __init__(self, home: tempfile.TemporaryDirectory[str], built: artifact.Built, inputs: tuple[Path, ...]) -> None:
        self._home = home
        self._inputs = inputs
        self._runner: Any = None
        self.report = built.report
        self.verification: Verification | None = built.verification

    @property
    def directory(self) -> Path:
        """Where the files are now; the directory goes with this object."""
        return Path(self._home.name) / "artifact"

    @property
    def model(self) -> onnx.ModelProto:
        """The rewritten model, read anew at each call."""
        import onnx

        return onnx.load(self.directory / artifact.MODEL_NAME)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write model.onnx, the library, manifest.json and the reports; whole or not at all.

        Raises UserError where the directory cannot be written or holds somebody else's files.
        """
        destination = Path(directory)
        with staged_directory(destination, artifact.REPORT_NAME, self._inputs) as stage:
            shutil.copytree(self.directory, stage, dirs_exist_ok=True)
        return destination

    def run(self, inputs: Mapping[str, np.ndarray], threads: int | None = None) -> dict[str, np.ndarray]:
        """Arrays by input name in, arrays by output name out.

        Runs the compiled library where it is one for this machine, else the rewritten model in ONNX Runtime.
        Raises UserError where the model refuses the inputs.
        """
        from attnrewrite.verify.runners import CompiledRunner, OnnxRunner

        if self._runner is None or self._runner[0] != threads:
            if artifact.runs_here(self.report):
                runner: CompiledRunner | OnnxRunner = CompiledRunner(self.directory, threads)
            else:
                runner = OnnxRunner(self.directory / artifact.MODEL_NAME, threads)
            self._runner = (threads, runner)
        return artifact.run_once(self._runner[1], inputs)


class ModuleResult:
    """A rewritten PyTorch model, verified and perhaps compiled.

    module: what is called in place of the original; a torch.fx.GraphModule that shares its parameters. program: the
    same as a torch.export.ExportedProgram; None where a GraphModule was given. compiled: of the target that was asked
    for.
    """

    def __init__(
        self,
        model: GraphModule | ExportedProgram,
        module: GraphModule,
        given: Given,
        report: Report,
        verification: Verification | None,
        compiled: Result | None,
    ) -> None:
        from attnrewrite import modules

        self._given = given
        self.program = modules.as_program(model)
        self.module = module
        self.report = report
        self.verification = verification
        self.compiled = compiled

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write model.pt2 and the reports, and the artifact where a target was asked for; whole or not at all.

        Raises UserError where the directory cannot be written or holds somebody else's files, or where torch.export
        cannot trace the rewritten GraphModule.
        """
        from attnrewrite import modules

        destination = Path(directory)
        with staged_directory(destination, artifact.REPORT_NAME, ()) as stage:
            if self.compiled is not None:
                shutil.copytree(self.compiled.directory, stage, dirs_exist_ok=True)
            modules.save(self.program or self._given.exported(self.module), stage / "model.pt2")
            if self.compiled is None:
                artifact.write_reports(self.report, stage, "")
            else:
                artifact.name_files(stage)
        return destination

    def run(self, inputs: Mapping[str, np.ndarray], threads: int | None = None) -> dict[str, np.ndarray]:
        """Arrays through the compiled library, as `Result.run`. Raises UserError where no target was asked for."""
        if self.compiled is None:
            raise UserError("the model was not compiled: name a target, or call result.module")
        return self.compiled.run(inputs, threads)


def inspect(
    model: ModelLike, input_shapes: InputShapes | None = None, *, passes: Passes | Pipeline | None = None
) -> Report:
    """What there is to rewrite, without writing anything: every softmax as a site, with a verdict and a reason.

    input_shapes: extents for symbolic axes, by input name. Raises UserError for bad input.
    """
    stages = artifact.Stages()
    with _on_disk(model) as source, as_onnx(source.path) as path:
        outcome = artifact.rewrite(path, artifact.pipeline_of(passes), input_shapes or {}, stages)
    return artifact.report_of(source.name, outcome, stages)


def explain(model: ModelLike, site: str | None = None, input_shapes: InputShapes | None = None) -> tuple[Site, ...]:
    """Every site (or the one with that id or node name): the nearest match, what stopped it, and in `readings` what a
    few of its queries read.

    Raises UserError for bad input and for a site that the model does not have.
    """
    with _on_disk(model) as source, as_onnx(source.path) as path:
        report = inspect(path, input_shapes)
        chosen = tuple(s for s in report.sites if site is None or site in (s.id, s.node))
        if site is not None and not chosen:
            known = ", ".join(s.id for s in report.sites) or "none, for the model has no softmax"
            raise UserError(f"{source.name} has no site {site!r}; its sites are {known}")
        return artifact.with_readings(path, chosen, input_shapes or {})


@overload
def optimize(model: ModelLike, example_inputs: None = None, target: str | None = None, **options: Any) -> Result: ...


@overload
def optimize(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    target: str | None = None,
    **options: Any,
) -> ModuleResult: ...


def optimize(  # type: ignore[misc]  # the overloads tell the results apart; options are named here alone
    model: ModelLike | torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    target: str | None = None,
    *,
    passes: Passes | Pipeline | None = None,
    precision: str = "fp32",
    compile: bool = True,
    inline: bool = False,
    verify: bool = True,
    input_shapes: InputShapes | None = None,
    threads: int | None = None,
    tvm_target: str | None = None,
    tune: float | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    freeze: bool | None = None,
    on_pass: Callable[[str, Graph], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Result | ModuleResult:
    """Rewrite a model, verify it, and compile it for a target ("cpu", "arm:cortex-a76", "metal", "cuda:sm_90" ...).

    model: an .onnx or .pt2 file, an onnx.ModelProto; or a PyTorch model, called with example_inputs (and
    example_kwargs), which gives a ModuleResult. target None: rewrite and verify only. passes: names or Pass values, in
    order, or a Pipeline; all by default.
    tune: seconds in which register tiles are measured on this machine, for target "cpu"; what is found is remembered
    for the machine kind and used by later runs, unless they are given 0.
    dynamic_shapes: of a PyTorch model, as torch.export takes them. freeze: whether its parameters may become constants;
    by default where no gradients are recorded (torch.no_grad(), or no parameter requires any).
    on_pass: called with the name and the graph after each pass. progress: called with a few words as each stage begins.
    Raises UserError for bad input, VerificationError where the result is not the original's, CompilerError where the
    compiler failed (with compile=False the rewritten model is to be had all the same).
    """
    options = Options(
        target, passes, precision, compile, inline, verify, dict(input_shapes or {}), threads, tvm_target, tune
    )
    if "torch" in sys.modules and not isinstance(model, (str, os.PathLike)):
        from attnrewrite import modules

        if modules.is_model(model):
            given = modules.Given(model, tuple(example_inputs or ()), dict(example_kwargs or {}), dynamic_shapes)
            return _optimize_module(given, options, freeze, on_pass, progress)
    if example_inputs is not None or example_kwargs or dynamic_shapes is not None:
        raise UserError("example inputs and dynamic shapes go with PyTorch models; a file says its own")
    return _optimize_file(cast("ModelLike", model), options, on_pass, progress)


def _optimize_file(
    model: ModelLike,
    options: Options,
    on_pass: Callable[[str, Graph], None] | None,
    progress: Callable[[str], None] | None,
    name: str | None = None,
) -> Result:
    """name: how the report calls the model, otherwise by its path."""
    from attnrewrite.verify.numeric import require

    home = tempfile.TemporaryDirectory(prefix="attnrewrite-")
    try:
        directory = Path(home.name) / "artifact"
        directory.mkdir()
        with _on_disk(model) as source:
            built = artifact.build(
                source.path, directory, options, name=name or source.name, on_pass=on_pass, progress=progress
            )
        if built.verification is not None:
            require(built.verification)
        if built.compiler_error is not None:
            raise built.compiler_error
    except BaseException:
        home.cleanup()
        raise
    return Result(home, built, source.inputs)


def _optimize_module(
    given: Given,
    options: Options,
    freeze: bool | None,
    on_pass: Callable[[str, Graph], None] | None,
    progress: Callable[[str], None] | None,
) -> ModuleResult:
    from attnrewrite import modules
    from attnrewrite.verify.numeric import require

    artifact.check_options(options)
    stages = artifact.Stages(progress)
    with stages.stage("read", f"tracing {given.name}"):
        model = given.traced()
    with stages.stage("rewrite", "looking for local attention"):
        done = modules.rewrite(
            model,
            given.inputs,
            pipeline=artifact.pipeline_of(options.passes),
            freeze=modules.is_frozen(given.model) if freeze is None else freeze,
            on_pass=on_pass,
        )
    if options.compile:
        with stages.stage("compile", "compiling kernels"):
            modules.prepare_kernels(modules.graph_of(done.model))
    module, verification = modules.delivered(done), None
    if options.verify:
        with stages.stage("verify", "verifying"):
            verification = modules.verify(model, module, given.inputs, given.kwargs)
        require(verification)
    report = artifact.report_of(given.name, done.outcome, stages)
    if verification is not None:
        report = replace(report, verification=verification.to_json())
    compiled: Result | None = None
    if options.target is not None:
        with given.as_onnx(model) as path:
            compiled = _optimize_file(path, options, None, progress, given.name)
    return ModuleResult(done.model, module, given, report, verification, compiled)


def load(directory: str | os.PathLike[str], cuda_graph: bool = True, device: int = 0) -> LoadedModel:
    """A saved artifact, ready to run: `load("out/").run({"x": array}, threads=1)`. See attnrewrite.runtime.

    device: which of several GPUs, from 0 on.
    """
    from attnrewrite import runtime

    return runtime.load(Path(directory), cuda_graph, device)


@dataclass(frozen=True)
class _Source:
    """A model file, what to call it, and the files of the user's that it consists of."""

    path: Path
    name: str
    inputs: tuple[Path, ...]


@contextmanager
def _on_disk(model: ModelLike) -> Iterator[_Source]:
    """A model as a file; one in memory is written to a temporary file meanwhile."""
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        artifact.check_model_path(path)
        yield _Source(path, os.fspath(model), (path.resolve(),))
        return
    import onnx

    if not isinstance(model, onnx.ModelProto):
        raise UserError(f"a model is a path or an onnx.ModelProto, got {type(model).__name__}")
    with tempfile.TemporaryDirectory(prefix="attnrewrite-") as folder:
        path = Path(folder) / "model.onnx"
        save_copy(model, path)
        yield _Source(path, model.graph.name or "model", ())


def save_copy(model: onnx.ModelProto, path: Path) -> None:
    """Write a model in memory, its weights in a second file where one would be too large, and leave it as it is."""
    import onnx

    large = model.ByteSize() > SINGLE_FILE_BYTES
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # saving external data edits the tensors
    onnx.save(copy, path, save_as_external_data=large, location=f"{path.name}.data")
