"""The Python interface: the command line's verbs as functions on paths, models and arrays.

result = attnrewrite.optimize("swin.onnx", target="cpu")
result.save("out/")
outputs = result.run({"x": image})
model = attnrewrite.load("out/")
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnrewrite import artifact
from attnrewrite.artifact import InputShapes, Options, Passes
from attnrewrite.atomic import staged_directory
from attnrewrite.errors import UserError
from attnrewrite.frontend.pt2 import as_onnx
from attnrewrite.localattention.site import Site
from attnrewrite.report import Report

if TYPE_CHECKING:
    import onnx

    from attnrewrite.graph import Graph
    from attnrewrite.pipeline import Pipeline
    from attnrewrite.runtime import LoadedModel
    from attnrewrite.verify.numeric import Verification

    ModelLike = str | os.PathLike[str] | onnx.ModelProto

# Above this a model in memory is written with its weights in a second file: one protobuf message ends at 2 GiB.
SINGLE_FILE_BYTES = 1_800_000_000


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


def optimize(
    model: ModelLike,
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
    on_pass: Callable[[str, Graph], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Rewrite a model, verify it, and compile it for a target ("cpu", "arm:cortex-a76", "metal", "cuda:sm_90" ...).

    target None: rewrite and verify only. passes: names or Pass values, in order, or a Pipeline; all by default.
    tune: seconds in which register tiles are measured on this machine, for target "cpu"; what is found is remembered
    for the machine kind and used by later runs, unless they are given 0.
    on_pass: called with the name and the graph after each pass. progress: called with a few words as each stage begins.
    Raises UserError for bad input, VerificationError where the result is not the original's, CompilerError where the
    compiler failed (with compile=False the rewritten model is to be had all the same).
    """
    from attnrewrite.verify.numeric import require

    options = Options(
        target, passes, precision, compile, inline, verify, dict(input_shapes or {}), threads, tvm_target, tune
    )
    home = tempfile.TemporaryDirectory(prefix="attnrewrite-")
    try:
        directory = Path(home.name) / "artifact"
        directory.mkdir()
        with _on_disk(model) as source:
            built = artifact.build(
                source.path, directory, options, name=source.name, on_pass=on_pass, progress=progress
            )
        if built.verification is not None:
            require(built.verification)
        if built.compiler_error is not None:
            raise built.compiler_error
    except BaseException:
        home.cleanup()
        raise
    return Result(home, built, source.inputs)


def load(directory: str | os.PathLike[str]) -> LoadedModel:
    """A saved artifact, ready to run: `load("out/").run({"x": array}, threads=1)`. See attnrewrite.runtime."""
    from attnrewrite import runtime

    return runtime.load(Path(directory))


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
