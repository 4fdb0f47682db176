"""The command line. Exit codes: 0 done, 1 verification failed, 2 bad usage or input, 3 the compiler failed.

`--json` prints one JSON document on standard output and nothing else there; everything for people goes to standard
error. With ATTNREWRITE_DEBUG set, errors show their traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from attnrewrite.errors import AttnRewriteError, CompilerError, UserError, VerificationError

if TYPE_CHECKING:
    from types import FrameType

    from rich.status import Status

    from attnrewrite.artifact import Options
    from attnrewrite.graph import Graph
    from attnrewrite.lowering.search import Progress
    from attnrewrite.report import Report

EXIT_VERIFICATION, EXIT_USAGE, EXIT_COMPILER = 1, 2, 3
EXIT_INTERNAL = 70  # EX_SOFTWARE: a bug of ours, none of the four the contract names
EXIT_INTERRUPTED = 130
PIPE_WIDTH = 120

stderr = Console(stderr=True, highlight=False, soft_wrap=False)


class Commands(TyperGroup):
    """Turns our errors into one sentence on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted; nothing was written", EXIT_INTERRUPTED)
        except VerificationError as error:
            fail(f"verification failed: {error}", EXIT_VERIFICATION)
        except UserError as error:
            fail(str(error), EXIT_USAGE)
        except CompilerError as error:
            fail(str(error), EXIT_COMPILER)
        except AttnRewriteError as error:
            fail(f"{error} (a bug of attnrewrite; ATTNREWRITE_DEBUG=1 shows where)", EXIT_INTERNAL)


app = typer.Typer(
    name="attnrewrite",
    cls=Commands,
    help="Finds local attention in vision models, proves it, fuses it, and compiles it with Apache TVM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file, or a .pt2 file of torch.export.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads to use.")]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph/--no-cuda-graph", help="Replay the launches of a CUDA library, or make each anew.")
]
Device = Annotated[int, typer.Option("--device", min=0, metavar="N", help="Which of several GPUs to run on.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape", metavar="NAME=1x3x224x224", help="Extents for an input with symbolic axes; repeatable."
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="cpu|arm|metal|cuda[:CHIP]", help="What to compile for; see `attnrewrite targets`."
    ),
]


def main() -> None:
    """Entry point of the command."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()


@app.command()
def inspect(model: Model, input_shape: Shapes = None, as_json: Json = False) -> None:
    """List every softmax of a model: what it is, whether it can be rewritten, and why not."""
    from attnrewrite import api

    with _status(quiet=as_json) as say:
        say(f"reading {model.name}")
        report = api.inspect(model, parse_shapes(input_shape))
    _show(report, as_json)


@app.command()
def explain(
    model: Model,
    site: Annotated[str | None, typer.Argument(metavar="[SITE]", help="A site's id or node; all by default.")] = None,
    input_shape: Shapes = None,
    as_json: Json = False,
) -> None:
    """Say for each softmax what the nearest match is and what stopped it, and draw what its queries read."""
    from attnrewrite import api
    from attnrewrite.report.drawing import explained
    from attnrewrite.report.terminal import render_site

    with _status(quiet=as_json) as say:
        say(f"reading {model.name}")
        sites = api.explain(model, site, parse_shapes(input_shape))
    if as_json:
        _print_json({"model": str(model), "sites": [explained(s) for s in sites]})
        return
    out = _stdout()
    if not sites:
        out.print(f"{model} has no softmax, so there is no attention to explain.")
    for found in sites:
        out.print(render_site(found))


@app.command()
def optimize(
    model: Model,
    target: Target = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to write; by default beside the model.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option("--precision", metavar="fp32|fp16|bf16", help="bf16: x86 CPUs with AVX512-BF16, CUDA from sm_80."),
    ] = "fp32",
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Rewrite only.")] = False,
    inline: Annotated[bool, typer.Option("--inline", help="Write the ops out as standard ONNX operators.")] = False,
    passes: Annotated[
        str | None, typer.Option("--passes", metavar="a,b,c", help="Only these passes, in order.")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip verification.")] = False,
    tvm_target: Annotated[
        str | None, typer.Option("--tvm-target", metavar="JSON", help="A TVM target in place of the preset.")
    ] = None,
    tune: Annotated[
        float | None,
        typer.Option(
            "--tune",
            min=0,
            metavar="SECONDS",
            help="Measure register tiles on this machine for so long (--target cpu). What is found is remembered and "
            "used by later runs; 0 does without it.",
        ),
    ] = None,
    threads: Threads = None,
    print_after: Annotated[
        str | None, typer.Option("--print-after", metavar="PASS|all", help="Print the graph after a pass.")
    ] = None,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Print how long each pass took.")] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    input_shape: Shapes = None,
) -> None:
    """Rewrite a model, verify it, and compile it for a target."""
    from attnrewrite import artifact
    from attnrewrite.atomic import staged_directory
    from attnrewrite.verify.numeric import require

    if target is None and not no_compile:
        raise UserError("--target is missing: one of cpu, arm, metal, cuda (or --no-compile to rewrite only)")
    artifact.check_model_path(model)
    options = artifact.Options(
        target=target,
        passes=None if passes is None else [name.strip() for name in passes.split(",") if name.strip()],
        precision=precision,
        compile=not no_compile,
        inline=inline,
        verify=not no_verify,
        input_shapes=parse_shapes(input_shape),
        threads=threads,
        tvm_target=tvm_target,
        tune=tune,
    )
    known = artifact.check_options(options)
    destination = (
        output if output is not None else artifact.default_directory(model, known.name if known else "rewritten")
    )
    built: artifact.Built | None = None
    try:
        with (
            _status(quiet=as_json or quiet) as say,
            staged_directory(destination, artifact.REPORT_NAME, (model,)) as stage,
        ):
            built = artifact.build(
                model, stage, options, on_pass=_printer(print_after, options), progress=say, on_tuning=say.tuning
            )
            if built.verification is not None:
                require(built.verification)
    except VerificationError:
        if built is not None:
            _show(built.report, as_json, quiet)
        raise
    _show(built.report, as_json, quiet)
    if time_passes:
        for name, seconds in built.report.passes.items():
            typer.echo(f"{seconds:9.3f} s  {name}", err=True)
    if not quiet and not as_json:
        typer.echo(f"\nWritten to {destination}", err=True)
    if built.compiler_error is not None:
        sentence = f"{built.compiler_error}; {destination} holds the rewritten model and the report"
        fail(sentence, EXIT_COMPILER, built.compiler_error)


@app.command()
def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The .onnx or .pt2 file as it was.")],
    rewritten: Annotated[
        Path, typer.Argument(metavar="REWRITTEN_OR_DIR", help="A rewritten .onnx file, or an output of optimize.")
    ],
    trials: Annotated[int, typer.Option("--trials", min=1, metavar="N", help="How many inputs to try.")] = 3,
    threads: Threads = None,
    emulate: Annotated[
        bool,
        typer.Option("--emulate", help="Run a library for metal on the CPU, with every access to memory checked."),
    ] = False,
    as_json: Json = False,
    input_shape: Shapes = None,
) -> None:
    """Prove a rewritten model equal to its original, exactly at every op and on numbers."""
    from attnrewrite import artifact
    from attnrewrite.report.terminal import render_verification
    from attnrewrite.verify.numeric import require

    artifact.check_model_path(original)
    with _status(quiet=as_json) as say:
        say("verifying")
        verification = artifact.verify_artifact(
            original,
            rewritten,
            trials=trials,
            input_shapes=parse_shapes(input_shape),
            threads=threads,
            emulate_metal=emulate,
        )
    if as_json:
        _print_json({"original": str(original), "rewritten": str(rewritten)} | verification.to_json())
    else:
        _stdout().print(render_verification(verification))
    require(verification)


@app.command()
def run(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output of optimize.")],
    inputs: Annotated[list[str], typer.Option("--input", metavar="NAME=x.npy", help="An input array; repeatable.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR2", help="Where to write one .npy file per output.")],
    threads: Threads = None,
    cuda_graph: CudaGraph = True,
    device: Device = 0,
) -> None:
    """Run an artifact on arrays from .npy files."""
    from attnrewrite import arrays, artifact
    from attnrewrite.atomic import staged_directory

    files = arrays.parse_inputs(inputs)
    runner = artifact.runner_of(directory, threads, cuda_graph, device)
    loaded = arrays.load_inputs(files, directory / artifact.MODEL_NAME)
    with staged_directory(output, arrays.INDEX_NAME, (directory / artifact.MODEL_NAME, *files.values())) as stage:
        for name, array in arrays.save_outputs(artifact.run_once(runner, loaded), stage).items():
            typer.echo(f"{name}: {array.dtype} {'x'.join(map(str, array.shape))}", err=True)
    typer.echo(f"Written to {output}", err=True)


@app.command()
def bench(
    subject: Annotated[Path, typer.Argument(metavar="MODEL_OR_DIR", help="An output of optimize; or a model.")],
    against: Annotated[
        str, typer.Option("--against", metavar="original,onnxruntime,openvino", help="Peers, separated by commas.")
    ] = "original,onnxruntime",
    threads: Threads = None,
    cuda_graph: CudaGraph = True,
    device: Device = 0,
    as_json: Json = False,
) -> None:
    """Time the compiled model against the original, and the rewritten model, in ONNX Runtime.

    With openvino among the peers, against the original in OpenVINO too, where that is installed.

    A model is optimized for this machine's CPU first, in a temporary directory.
    """
    from attnrewrite import api, artifact
    from attnrewrite import bench as timing
    from attnrewrite.frontend.pt2 import as_onnx
    from attnrewrite.verify.libraries import why_not_here

    peers = [name.strip() for name in against.split(",") if name.strip()]
    original: Path | None = None
    with contextlib.ExitStack() as stack:
        say = stack.enter_context(_status(quiet=as_json))
        directory = subject
        if not subject.is_dir():
            result = api.optimize(subject, target="cpu", threads=threads, verify=False, progress=say)
            directory, original = result.directory, stack.enter_context(as_onnx(subject))
        report = artifact.read_report(directory)[0]
        if artifact.has_library(report) and not artifact.runs_here(report):
            typer.echo(why_not_here(report.target or ""), err=True)
        entries = timing.contestants(directory, peers, original, threads, cuda_graph, device)
        say("timing " + ", ".join(f"{entry.name} in {entry.engine}" for entry in entries))
        timings = timing.measure(entries, timing.example_inputs(directory / artifact.MODEL_NAME))
        report = report.with_gains(timing.gains(timings, threads))
    if as_json:
        _print_json({"model": report.model, "target": report.target, **(report.gains or {})})
    else:
        _show(report, as_json=False)


@app.command()
def targets(as_json: Json = False) -> None:
    """List what can be compiled for."""
    from rich.table import Table

    from attnrewrite.lowering.targets import list_targets

    known = list_targets()
    if as_json:
        _print_json({"targets": [target.to_json() | {"description": target.description} for target in known]})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("target", "library", "what comes out"):
        table.add_column(column)
    for target in known:
        table.add_row(target.name, target.library, target.description)
    _stdout().print(table)


def _printer(print_after: str | None, options: Options) -> Callable[[str, Graph], None] | None:
    """What --print-after asks for; the text goes to standard error, for standard output may be a JSON document."""
    if print_after is None:
        return None
    from attnrewrite import artifact

    names = artifact.pipeline_of(options.passes).names
    if print_after != "all" and print_after not in names:
        raise UserError(
            f"--print-after: there is no pass {print_after!r} in this run; its passes are {', '.join(names)}"
        )

    def on_pass(name: str, graph: Graph) -> None:
        if print_after in ("all", name):
            typer.echo(f"# after {name}\n{graph}\n", err=True)

    return on_pass


def parse_shapes(texts: list[str] | None) -> dict[str, tuple[int | str, ...]]:
    """["x=1x3x224x224"] -> {"x": (1, 3, 224, 224)}; an entry that is no number is the name of a symbolic axis.

    The last "=" divides, for names may hold one. Raises UserError for anything else.
    """
    shapes: dict[str, tuple[int | str, ...]] = {}
    for text in texts or []:
        name, equals, extents = text.rpartition("=")
        if not equals or not name or not extents or not all(extents.split("x")):
            raise UserError(f"--input-shape takes NAME=1x3x224x224, got {text!r}")
        if name in shapes:
            raise UserError(f"--input-shape is given twice for {name}")
        shape = tuple(int(e) if e.isascii() and e.isdigit() else e for e in extents.split("x"))
        if any((isinstance(e, int) and e < 1) or (isinstance(e, str) and not e.isidentifier()) for e in shape):
            raise UserError(f"--input-shape takes positive extents or names, got {text!r}")
        shapes[name] = shape
    return shapes


def fail(sentence: str, code: int, error: BaseException | None = None) -> NoReturn:
    """One sentence on standard error (after the traceback, if that is asked for), and the exit code."""
    error = error or sys.exception()
    if os.environ.get("ATTNREWRITE_DEBUG") and error is not None:
        traceback.print_exception(error)
    typer.echo(f"attnrewrite: {' '.join(sentence.split())}", err=True)
    raise SystemExit(code)


def _stdout() -> Console:
    """Tables keep their shape when they go into a file or a pipe, which have no width."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


class _Silent:
    """How the user is told what goes on: here, not at all."""

    def __call__(self, sentence: str) -> None:
        """A stage begins."""

    def tuning(self, progress: Progress) -> None:
        """Tiles are being measured."""


class _Lines(_Silent):
    """One line per stage, for files and pipes."""

    _announced = False

    def __call__(self, sentence: str) -> None:
        typer.echo(f"{sentence} ...", err=True)

    def tuning(self, progress: Progress) -> None:
        if not self._announced:
            self(f"measuring register tiles of {progress.products} matrix products for {progress.budget:g} s")
        self._announced = True


class _Live(_Silent):
    """A moving line on a terminal, with a bar while tiles are measured."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def __call__(self, sentence: str) -> None:
        self._status.update(sentence)

    def tuning(self, progress: Progress) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(progress.budget, progress.used, width=24)
        seconds = f"{progress.used:.0f} of {progress.budget:g} s"
        line.add_row("tuning", bar, seconds, progress.sentence)
        self._status.update(line)


@contextlib.contextmanager
def _status(quiet: bool) -> Iterator[_Silent]:
    """A way to say what goes on: a moving line on a terminal, one line per stage elsewhere, nothing when quiet."""
    if quiet:
        yield _Silent()
    elif stderr.is_terminal:
        with stderr.status("starting") as status:
            yield _Live(status)
    else:
        yield _Lines()


def _show(report: Report, as_json: bool, quiet: bool = False) -> None:
    """JSON on standard output, or the table on standard output for people."""
    from attnrewrite.report.terminal import render

    if as_json:
        _print_json(report.to_json())
    elif not quiet:
        _stdout().print(render(report))


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2))


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Being told to stop leaves as little behind as Ctrl-C."""
    raise KeyboardInterrupt
