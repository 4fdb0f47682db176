"""Arrays in and out of files, for `attnrewrite run`: one .npy file each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from attnrewrite.atomic import GENERATOR
from attnrewrite.errors import UserError
from attnrewrite.floats import is_float
from attnrewrite.verify.inputs import InputSpec, interface

INDEX_NAME = "outputs.json"


def parse_inputs(texts: Sequence[str]) -> dict[str, Path]:
    """["x=image.npy"] -> {"x": Path("image.npy")}. Raises UserError for what is not NAME=FILE or names one twice."""
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise UserError(f"--input takes NAME=x.npy, got {text!r}")
        if name in files:
            raise UserError(f"--input is given twice for {name}")
        files[name] = Path(file)
    return files


def load_inputs(files: Mapping[str, Path], model: Path) -> dict[str, np.ndarray]:
    """The arrays, each of its input's dtype: another float type is converted, any other difference is bad input.

    Raises UserError where a file, a name, a shape or a dtype does not fit the model.
    """
    specs = {spec.name: spec for spec in interface(model).inputs}
    names = ", ".join(specs)
    for name in files:
        if name not in specs:
            raise UserError(f"the model has no input {name}; its inputs are {names}")
    missing = [name for name in specs if name not in files]
    if missing:
        raise UserError(f"--input is missing for {', '.join(missing)}; the inputs are {names}")
    return {name: _load(specs[name], file) for name, file in files.items()}


def save_outputs(outputs: Mapping[str, np.ndarray], directory: Path) -> dict[str, np.ndarray]:
    """Write one file per output, named after it, and the index that says which is which; returns the outputs.

    Files hold no bfloat16: such an output is float32 there.
    """
    files: dict[str, str] = {}
    for name, array in outputs.items():
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".") or "output"
        while f"{stem}.npy" in files.values():
            stem += "_"
        files[name] = f"{stem}.npy"
        np.save(directory / files[name], array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array)
    index = {"generator": GENERATOR, "outputs": files, "files": sorted(files.values())}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return dict(outputs)


def _load(spec: InputSpec, file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is not a .npy file, or it is truncated") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{file} holds several arrays, one is expected for input {spec.name}")
    fits = array.ndim == len(spec.shape) and all(
        isinstance(want, str) or want == have for have, want in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        want = "x".join(map(str, spec.shape))
        raise UserError(f"{file} has shape {'x'.join(map(str, array.shape))}, input {spec.name} takes {want}")
    if array.dtype != spec.dtype:
        if not is_float(array.dtype) or not is_float(spec.dtype):
            raise UserError(f"{file} has elements of {array.dtype}, input {spec.name} takes {spec.dtype}")
        array = array.astype(spec.dtype)
    return array
