"""README.md of an artifact directory: what it holds and how to run it on its device."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import attnrewrite
from attnrewrite.errors import UserError
from attnrewrite.report.document import Report, facts, headline
from attnrewrite.runtime import Tensor, is_linked_in, read_manifest

if TYPE_CHECKING:
    from jinja2 import Template

_NEEDS = {
    "cpu": "The library is for CPUs like that of the machine it was compiled on.",
    "arm": "The library is for 64-bit ARM under {system}.",
    "metal": "The library is for macOS on Apple silicon: Python must be an arm64 one, not one under Rosetta.",
    "cuda": "The library is for an NVIDIA GPU of the architecture named above, and needs a driver but no CUDA toolkit.",
}
_ANYWHERE = "No library was compiled: the rewritten model runs in ONNX Runtime, on any machine."

_QUARANTINE = "macOS quarantines what a browser fetched: `xattr -d com.apple.quarantine {library}` lifts that."
_FIRST_RUN = "The first run takes longer: macOS compiles the kernels for the GPU at hand."


def readme_of(report: Report, directory: Path, model: Path) -> str:
    """The README of a directory by what stands in it: its manifest, or the rewritten model's interface."""
    from attnrewrite.verify.inputs import interface

    if report.compile is not None and "error" not in report.compile:
        manifest = read_manifest(directory)
        tvm = manifest.versions["apache-tvm"]
        return to_readme(
            report,
            manifest.inputs,
            manifest.outputs,
            library=manifest.library,
            tvm=tvm,
            weights_file=manifest.weights_file,
        )
    inputs: list[Tensor] = []
    with contextlib.suppress(UserError):  # inputs of unknown rank, or none of numbers
        inputs = [Tensor(spec.name, str(spec.dtype), spec.shape) for spec in interface(model).inputs]
    return to_readme(report, inputs, (), library=None, tvm=None, program=not model.exists())


def to_readme(
    report: Report,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    library: str | None,
    tvm: str | None,
    weights_file: str | None = None,
    program: bool = False,
) -> str:
    """Markdown. inputs and outputs may be empty, where they are not known.

    library: file name of the compiled library, None where there is none; tvm: the version it runs on. program: the
    directory holds a PyTorch program and no ONNX file.
    """
    what = "rewritten" if library is None else f"for {report.target}"
    is_file = Path(report.model).suffix in (".onnx", ".pt2")
    name = Path(report.model).name
    return _template().render(
        title=f"{name} {what}" + (f" ({report.precision})" if library and report.precision != "fp32" else ""),
        version=attnrewrite.__version__,
        headline=headline(report),
        facts=[row for row in facts(report) if row[0] not in ("Graph", "Time", "Speed", "Tuning")],
        inputs=inputs,
        outputs=outputs,
        code=_code,
        program=program,
        app=library is not None and is_linked_in(library),
        library=library,
        weights_file=weights_file,
        needs=_ANYWHERE if library is None else _needs(report.target or ""),
        arguments=" ".join(f"--input {shlex.quote(f'{t.name}={_file_name(t.name)}')}" for t in inputs),
        tvm=tvm,
        original=shlex.quote(f"../{name}") if is_file else "MODEL",
        given=f"the original, which must be at {_code(f'../{name}')}" if is_file else "the model this was made from",
        hints=[hint.format(library=library) for hint in _hints(library, report.target or "")],
    )


def _needs(target: str) -> str:
    kind = target.partition(":")[0]
    return _NEEDS[kind].format(system="macOS" if "apple" in target else "Linux")


def _hints(library: str | None, target: str) -> tuple[str, ...]:
    if library is None or not library.endswith(".dylib"):
        return ()
    return (_QUARANTINE, _FIRST_RUN) if target.startswith("metal") else (_QUARANTINE,)


def _file_name(tensor: str) -> str:
    return f"{re.sub(r'[^0-9A-Za-z.-]+', '_', tensor).lstrip('.-') or 'input'}.npy"


def _code(text: str) -> str:
    """A name of the model's as code in a table: backquotes and bars would end it, and line breaks the row."""
    return "`" + re.sub(r"[`|\s]", "?", text) + "`"


@cache
def _template() -> Template:
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(files(__package__).joinpath("readme.md.j2").read_text(encoding="utf-8"))
