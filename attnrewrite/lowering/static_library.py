"""A model as a static library with a C interface of its own, for apps that may not load code at run time.

TVM's code registers its functions when the program starts (a "system library"); a C file made for the model loads them
through TVM's C interface. Both go into the archive; a header, a module map and an example in Swift stand beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from jinja2 import Environment, StrictUndefined
from tvm_ffi import libinfo

from attnrewrite.lowering.targets import Target
from attnrewrite.lowering.zig import run_zig
from attnrewrite.runtime import Tensor, Weight

HEADER_NAME = "model.h"
_BESIDE = (HEADER_NAME, "module.modulemap", "Example.swift")


def export_static(
    executable: Any,
    target: Target,
    directory: Path,
    *,
    name: str,
    entry: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    weights: Sequence[Weight],
    weights_file: str | None,
) -> tuple[str, ...]:
    """Write the archive, `target.library`, and what stands beside it; returns the names of the latter.

    executable: built with `system_prefix(name)`. name: what its C functions begin with. Raises CompilerError with the
    words of the C compiler or the archiver where one of them fails.
    """
    values = {
        "name": name,
        "title": f"{name} for {target.name}",
        "entry": entry,
        "inputs": [_printable(tensor) for tensor in inputs],
        "outputs": [_printable(tensor) for tensor in outputs],
        "weights": weights,
        "weights_file": weights_file,
        "weights_bytes": max((w.offset + _bytes(w.dtype, w.shape) for w in weights), default=0),
        "max_rank": max([1, *(len(t.shape) for t in inputs), *(len(w.shape) for w in weights)]),
        "device_type": int(tvm.device(target.device).dlpack_device_type()),
        "dtype": _dtype,
        "extents": _extents,
        "bytes": lambda tensor: _bytes(tensor.dtype, _extents(tensor)),
    }
    for file in _BESIDE:
        (directory / file).write_text(_rendered(file, values), encoding="utf-8")

    def archive(output: str, objects: Sequence[str], options: Sequence[str] | None = None, **_: Any) -> None:
        source = Path(objects[0]).with_name("model.c")
        source.write_text(_rendered("model.c", values), encoding="utf-8")
        compiled = source.with_suffix(".o")
        includes = [
            f"-I{path}" for path in (directory, libinfo.find_include_path(), libinfo.find_dlpack_include_path())
        ]
        triple = [] if target.link is None else ["-target", target.link]
        flags = ["-c", "-O2", "-fPIC", "-ffreestanding", "-std=c11", "-Wall", "-Werror"]
        command = ["cc", *triple, *flags, *includes, "-o", str(compiled), str(source)]
        run_zig(command, "compiling the C interface failed")
        Path(output).unlink(missing_ok=True)
        run_zig(["ar", "rcsD", output, str(compiled), *objects], f"archiving {Path(output).name} failed")

    executable.export_library(str(directory / target.library), fcompile=archive)
    return _BESIDE


def system_prefix(name: str) -> str:
    """What the functions of a model of this name begin with, so that an app may hold several models."""
    return f"{name}_"


def _rendered(file: str, values: Mapping[str, Any]) -> str:
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = files(__package__).joinpath("embedded", f"{file}.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def _printable(tensor: Tensor) -> Tensor:
    """With a name that ends no comment."""
    return replace(tensor, name=re.sub(r"[^ -~]|\*/", "?", tensor.name))


def _dtype(name: str) -> tuple[int, int, int]:
    dtype = tvm_ffi.dtype(name)
    return dtype.type_code, dtype.bits, dtype.lanes


def _extents(tensor: Tensor) -> tuple[int, ...]:
    """A shape to show: 1 for what is symbolic."""
    return tuple(extent if isinstance(extent, int) else 1 for extent in tensor.shape)


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * int(tvm_ffi.dtype(dtype).itemsize)
