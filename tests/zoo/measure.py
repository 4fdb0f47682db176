"""One model of the zoo through one exporter: exported, rewritten, verified, in a child process under limits.

Its folder holds model.onnx (kept: an export of an unchanged model is not made again), result.json and log.txt.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import os
import resource
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnrewrite.localattention.site import Site
from attnrewrite.report import Report
from tests.zoo.model import DYNAMO, OPSETS, Model

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600
MEMORY = 14 * 2**30  # of address space, of which torch reserves some without using it
# Children are forked from a process that has imported the packages, so that each does not take seconds to do so.
_CHILDREN = multiprocessing.get_context("forkserver")
_CHILDREN.set_forkserver_preload(["tests.zoo.preload"])
SYMBOLIC, FIXED = "symbolic", "1, 2"
EXPORT_TOLERANCE = 0.01  # an exporter that mixes up axes is off by about 1; its rounding is not what is tested here
TRIALS = 4  # every kind of input; batches 1, 2, 3, 1 where the batch is symbolic


@dataclass(frozen=True)
class Result:
    """What became of one export. Fields after `failed` are None where nothing was rewritten or read.

    failed: "" or what stopped it, on one line; stage: where (run: the child itself). written_out: whether
    scaled_dot_product_attention had to be written as products and a softmax for the exporter. batch: symbolic, or the
    fixed sizes tried. seconds: reading and rewriting the file. sites: as report.json writes them.
    error, tolerance: the largest difference and what is allowed, of the trial with the least room.
    """

    model: str
    exporter: str
    fingerprint: str
    failed: str = ""
    stage: str = ""
    written_out: bool = False
    batch: str = ""
    seconds: float | None = None
    nodes_before: int | None = None
    nodes_after: int | None = None
    sites: tuple[dict[str, Any], ...] = ()
    error: float | None = None
    tolerance: float | None = None
    proved: int = 0

    @property
    def found(self) -> tuple[Site, ...]:
        """The sites as values."""
        return Report.from_json(
            {"model": "", "reparam": [], "nodes_before": 0, "nodes_after": 0, "sites": self.sites}
        ).sites

    @classmethod
    def read(cls, path: Path) -> Result | None:
        """The result in a file; None where there is none, or one of an earlier form."""
        try:
            document = json.loads(path.read_text())
            return cls(**document | {"sites": tuple(document["sites"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None


def fingerprint(model: Model, exporter: str) -> str:
    """Changes where the result might: with the library, the model's description, or a package."""
    digest = hashlib.sha256(export_fingerprint(model, exporter).encode())
    for source in sorted([*(ROOT / "attnrewrite").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def export_fingerprint(model: Model, exporter: str) -> str:
    said = [model.name, exporter, str(OPSETS[exporter]), repr(model.inputs), str(model.ids)]
    build = model.build
    if isinstance(build, partial):
        said += [inspect.getsource(build.func), repr(build.args), repr(build.keywords)]
    else:
        said.append(inspect.getsource(build))
    for package in ("torch", "onnxscript", model.distribution):
        try:
            said.append(version(package))
        except PackageNotFoundError:
            said.append("")
    said.append((ROOT / "examples" / "exporting.py").read_text())
    said += [inspect.getsource(function) for function in (_export, _attempt, _check_export)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def measured(model: Model, exporter: str, folder: Path, *, fresh: bool = False, seconds: float = SECONDS) -> Result:
    """The result in `folder`, or a new one where that is of another state of the sources."""
    path = folder / "result.json"
    known = Result.read(path)
    wanted = fingerprint(model, exporter)
    if known is not None and known.fingerprint == wanted and known.stage != "run" and not fresh:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    child = _CHILDREN.Process(target=_child, args=(model.name, exporter, folder))
    child.start()
    child.join(seconds)
    failed = ""
    if child.exitcode is None:
        failed = f"took more than {seconds:.0f} s"
        child.kill()
        child.join()
    elif child.exitcode:
        failed = f"ended with exit code {child.exitcode}"
    result = Result.read(path)
    if result is None or failed:
        result = Result(model.name, exporter, wanted, failed=failed or "wrote no result", stage="run")
        _write(result, path)
    return result


def _write(result: Result, path: Path) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(asdict(result), indent=1))
    os.replace(scratch, path)


def run(model: Model, exporter: str, folder: Path) -> Result:
    """Export, rewrite and verify, in this process."""
    known: dict[str, Any] = {
        "model": model.name,
        "exporter": exporter,
        "fingerprint": fingerprint(model, exporter),
    }
    try:
        files = _exported(model, exporter, folder)
    except Exception as error:
        return Result(**known, failed=_one_line(error), stage="export")
    known |= {"batch": files["batch"], "written_out": files["written_out"]}
    try:
        for position, name in enumerate(files["names"]):
            found = _rewritten(folder / name, folder)
            known |= found if position == 0 else {k: v for k, v in found.items() if k in ("error", "tolerance")}
    except Exception as error:  # what goes wrong belongs into the table, whatever it is
        return Result(**known, failed=_one_line(error), stage="rewrite")
    return Result(**known)


def _rewritten(path: Path, folder: Path) -> dict[str, Any]:
    from attnrewrite import artifact
    from attnrewrite.verify.numeric import require

    stages = artifact.Stages()
    outcome = artifact.rewrite(path, artifact.pipeline_of(None), {}, stages)
    found: dict[str, Any] = {
        "seconds": sum(stages.seconds.values()),
        "nodes_before": outcome.nodes_before,
        "nodes_after": outcome.nodes_after,
        "sites": tuple(site.to_json() for site in outcome.sites),
    }
    if outcome.modified:
        from attnrewrite.frontend.onnx import write

        rewritten = folder / f"rewritten-{path.name}"
        write(outcome.graph, rewritten)
        del outcome
        verification = artifact.verify_artifact(path, rewritten, trials=TRIALS, input_shapes={}, threads=1)
        require(verification)
        tightest = max(verification.comparisons, key=lambda c: c.error / c.tolerance if c.tolerance else 0.0)
        found |= {"error": tightest.error, "tolerance": tightest.tolerance, "proved": len(verification.exact)}
    return found


def _exported(model: Model, exporter: str, folder: Path) -> dict[str, Any]:
    """{names: files in the folder, batch, written_out}: with a symbolic batch where the exporter and the model can."""
    record = folder / "export.json"
    wanted = export_fingerprint(model, exporter)
    if record.exists():
        files = json.loads(record.read_text())
        if files["fingerprint"] == wanted:
            return _raised(files)
    files = {"fingerprint": wanted}
    try:
        files |= _export(model, exporter, folder)
    except Exception as error:
        files["failed"] = _one_line(error)
    record.write_text(json.dumps(files))
    return _raised(files)


def _raised(files: dict[str, Any]) -> dict[str, Any]:
    if "failed" in files:
        raise RuntimeError(files["failed"])
    return files


def _export(model: Model, exporter: str, folder: Path) -> dict[str, Any]:
    """The first that works of: symbolic batch as it is, with attention written out; fixed batches 1 and 2 likewise.

    A symbolic batch "works" where ONNX Runtime runs the file at batches 1 and 2.
    """
    failures = []
    for batch in (SYMBOLIC, FIXED):
        for written_out in (False, True) if exporter == DYNAMO else (False,):
            try:
                names = _attempt(model, exporter, folder, batch, written_out)
                return {"names": names, "batch": batch, "written_out": written_out}
            except Exception as error:
                failures.append(error)
    raise failures[-1]


def _attempt(model: Model, exporter: str, folder: Path, batch: str, written_out: bool) -> list[str]:
    import torch

    from examples.exporting import export
    from examples.models.common import randomize_

    torch.manual_seed(0)
    module = randomize_(model.build(), seed=0).eval()
    names = []
    for size in (1,) if batch == SYMBOLIC else (1, 2):
        name = "model.onnx" if size == 1 else f"model-{size}.onnx"
        inputs = tuple(torch.cat([x] * size) for x in model.examples())
        with _attention_written_out(written_out):
            export(
                module,
                inputs,
                folder / name,
                exporter=exporter,  # type: ignore[arg-type]
                opset=OPSETS[exporter],
                dynamic_batch=batch == SYMBOLIC,
            )
        for tried in (1, 2) if batch == SYMBOLIC else (size,):
            _check_export(folder / name, module, tuple(torch.cat([x] * tried) for x in model.examples()))
        names.append(name)
    return names


def _check_export(path: Path, module: Any, inputs: tuple[Any, ...]) -> None:
    """Raises where the file does not compute what the module does: some run at other batches, and are wrong."""
    import torch

    from attnrewrite.verify.numeric import compare
    from attnrewrite.verify.runners import OnnxRunner

    runner = OnnxRunner(path, 1)
    found = runner.run({"x" if k == 0 else f"x{k}": x.numpy() for k, x in enumerate(inputs)})
    with torch.no_grad():
        expected = module(*inputs)
    first = expected if isinstance(expected, torch.Tensor) else next(iter(expected))
    difference = compare(first.numpy(), found[runner.outputs[0]])
    if not difference.error <= EXPORT_TOLERANCE:
        raise ValueError(f"the export is wrong at batch {len(inputs[0])}: {difference}")


@contextmanager
def _attention_written_out(wanted: bool) -> Iterator[None]:
    """scaled_dot_product_attention as product, softmax and product: torch 2.13 cannot export some of its uses."""
    if not wanted:
        yield
        return
    import torch
    from torch.nn import functional

    def attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Any:
        scale = options.get("scale")
        logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
        if options.get("is_causal"):
            above = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(above, float("-inf"))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            logits = logits + attn_mask
        return logits.softmax(-1) @ v

    kept = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = kept


def _one_line(error: BaseException) -> str:
    """The error's kind and the telling part of its message: exporters write pages."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:240]


def _child(name: str, exporter: str, folder: Path) -> None:
    """What runs in the child process: everything it says goes to its log."""
    from tests.zoo.models import MODELS

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(folder / "log.txt", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    _write(run(MODELS[name], exporter, folder), folder / "result.json")
