"""torch.export archives (.pt2), read as the ONNX files that torch's exporter makes of them. Needs torch."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attnrewrite.errors import UserError, last_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SUFFIX = ".pt2"
OPSET = 18
# Above this the weights of a written ONNX file go into a second one: a protobuf message ends at 2 GiB.
SINGLE_FILE_BYTES = 1_800_000_000


def load(path: Path) -> ExportedProgram:
    """The program of an archive. Raises UserError where torch is missing or the file is no such archive."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a torch.export archive: to read it, install torch") from error
    if not path.is_file():
        raise UserError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}")
    import attnrewrite.operators  # noqa: F401 - an archive may hold the two ops

    try:
        with silenced():
            return torch.export.load(path)
    except Exception as error:  # torch raises whatever its readers of zip files, JSON and pickles do
        raise UserError(f"{path} is not a torch.export archive, or it is truncated: {last_line(error)}") from error


def to_onnx(program: ExportedProgram, path: Path) -> None:
    """Write the program as an ONNX file; inputs and outputs keep their names, symbolic extents stay symbolic.

    Raises UserError where torch's exporter cannot.
    """
    import torch

    from attnrewrite.operators.onnx import export

    stored = [*program.state_dict.values(), *program.constants.values()]
    weights = sum(t.numel() * t.element_size() for t in stored if isinstance(t, torch.Tensor))
    try:
        with torch.no_grad(), silenced():
            export(program, (), path, opset_version=OPSET, external_data=weights > SINGLE_FILE_BYTES, verbose=False)
    except ImportError as error:
        raise UserError(f"torch.onnx needs {error.name} to export a program: install it") from error
    except Exception as error:
        raise UserError(f"torch.onnx cannot export the program: {last_line(error)}") from error


@contextlib.contextmanager
def as_onnx(path: Path) -> Iterator[Path]:
    """A model file as an ONNX file: itself, or what a .pt2 archive exports to, which goes with the context."""
    if path.suffix != SUFFIX:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="attnrewrite-") as folder:
        exported = Path(folder) / f"{path.stem}.onnx"
        try:
            to_onnx(load(path), exported)
        except UserError as error:
            raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
        yield exported


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without the progress lines, warnings and log records below ERROR that torch's exporters write."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
