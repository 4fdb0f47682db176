"""Inputs to try a model on: random ones and ones made to be difficult.

A case is a way to fill the inputs. Wrong borders, wrong masks and unstable softmaxes hide from ordinary noise, so three
of the four cases are there for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.message import DecodeError

from attnrewrite.errors import UserError
from attnrewrite.verify.bfloat16 import is_bfloat16

# In the order they are tried: the first `trials` of this cycle, each with numbers of its own.
CASES = ("random", "large", "border", "constant")
BATCHES = (1, 2, 3)
# Amplitudes of the case "large": the first at which the model is still well-conditioned is tried.
LARGE = (32.0, 16.0, 8.0, 4.0, 2.0)
# Ids and class numbers of inputs for which the model does not bound them.
DEFAULT_UPPER = 2


@dataclass(frozen=True)
class InputSpec:
    """One input of a model. shape: extents, a name for each symbolic one. upper: integers lie in [0, upper)."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str, ...]
    upper: int = DEFAULT_UPPER


@dataclass(frozen=True)
class Interface:
    """What has to be known of a model to make inputs for it. half_precision, bfloat16: it computes in float16 or in
    bfloat16 somewhere.
    """

    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    half_precision: bool
    bfloat16: bool


def interface(path: Path) -> Interface:
    """Read the interface of an ONNX file. Raises UserError where it is none."""
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file, or it is truncated") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not model.graph.output:
        raise UserError(f"{path} is not an ONNX file, or it is truncated: it holds no graph")
    return Interface(
        input_specs(model), tuple(o.name for o in model.graph.output), _is_half_precision(model), is_bfloat16(model)
    )


def input_specs(model: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The inputs of a model, initializers excepted. An axis without extent or name is named INPUT_AXIS."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    uppers = _gather_extents(model.graph, weights)
    specs = []
    for value in model.graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        if not tensor.elem_type or not tensor.HasField("shape"):
            raise UserError(f"input {value.name} is not a tensor of known rank, so no inputs can be made for it")
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        if dtype.kind == "O":
            raise UserError(f"input {value.name} holds strings, for which no inputs can be made")
        shape = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}_{axis}"
            for axis, d in enumerate(tensor.shape.dim)
        )
        specs.append(InputSpec(value.name, dtype, shape, uppers.get(value.name, DEFAULT_UPPER)))
    return tuple(specs)


def resolve_shapes(
    specs: Sequence[InputSpec],
    known: Mapping[str, Sequence[int | str]],
    batch: int,
) -> dict[str, tuple[int, ...]]:
    """Extents for every symbolic axis: from `known`, by input name, else the batch, else a modest guess.

    Axis 0 is the batch where it is symbolic, and so is every other axis of the same name.
    Raises UserError where `known` names no input or does not fit one.
    """
    named = {spec.name: spec for spec in specs}
    values: dict[str, int] = {}
    for name, shape in known.items():
        if name not in named:
            raise UserError(f"the model has no input {name}; its inputs are {', '.join(named)}")
        declared = named[name].shape
        if len(declared) != len(shape):
            raise UserError(f"input {name} has {len(declared)} axes, got {len(shape)}: {'x'.join(map(str, shape))}")
        for have, want in zip(declared, shape, strict=True):
            if isinstance(have, str) and isinstance(want, int):
                values[have] = want
            elif isinstance(have, int) and isinstance(want, int) and have != want:
                raise UserError(
                    f"input {name} is declared {'x'.join(map(str, declared))}, got {'x'.join(map(str, shape))}"
                )
    for spec in specs:
        if spec.shape and isinstance(spec.shape[0], str):
            values.setdefault(spec.shape[0], batch)
    return {
        spec.name: tuple(
            e if isinstance(e, int) else values.get(e, _guess(axis, len(spec.shape)))
            for axis, e in enumerate(spec.shape)
        )
        for spec in specs
    }


def has_symbolic_batch(specs: Sequence[InputSpec], known: Mapping[str, Sequence[int | str]]) -> bool:
    fixed = {name for name, shape in known.items() if shape and isinstance(shape[0], int)}
    return any(spec.shape and isinstance(spec.shape[0], str) and spec.name not in fixed for spec in specs)


def make_inputs(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, tuple[int, ...]],
    case: str,
    rng: np.random.Generator,
    amplitude: float = 1.0,
) -> dict[str, np.ndarray]:
    """One array per input, of its dtype and of the shape given. amplitude: the standard deviation of normal noise."""
    return {spec.name: _fill(spec, shapes[spec.name], case, rng, amplitude) for spec in specs}


def nudged(inputs: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The inputs with every float moved by one unit in the last place, up or down at random."""
    moved = {}
    for name, array in inputs.items():
        wide = array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array  # as it is computed
        moved[name] = one_ulp_off(wide, rng) if np.issubdtype(wide.dtype, np.floating) else wide
    return moved


def one_ulp_off(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every element of a float array moved by one unit in the last place, up or down at random."""
    return np.nextafter(array, np.where(rng.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype))


def _fill(spec: InputSpec, shape: tuple[int, ...], case: str, rng: np.random.Generator, amplitude: float) -> np.ndarray:
    if spec.dtype == np.bool_:
        return np.full(shape, True) if case == "constant" else rng.random(shape) < 0.5
    if spec.dtype.kind in "iu":
        return (
            np.zeros(shape, spec.dtype) if case == "constant" else rng.integers(0, spec.upper, shape).astype(spec.dtype)
        )
    if case == "constant":
        return np.ones(shape, spec.dtype)
    array = amplitude * rng.standard_normal(shape)
    if case == "border":
        array = np.where(_frame(shape), array, 0.0)
    return array.astype(spec.dtype)


def _frame(shape: tuple[int, ...]) -> np.ndarray:
    """bool of `shape`: the first and the last index of every axis but the batch and those too short for an inside."""
    frame = np.zeros(shape, bool)
    for axis, extent in enumerate(shape):
        if axis > 0 and extent > 4:
            edge: list[slice | list[int]] = [slice(None)] * len(shape)
            edge[axis] = [0, extent - 1]
            frame[tuple(edge)] = True
    return frame if frame.any() else ~frame


def _guess(axis: int, rank: int) -> int:
    """An extent where the model gives none: three channels, 64 pixels, 16 tokens."""
    if rank == 4:
        return 3 if axis == 1 else 64
    return 16


def _gather_extents(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto]) -> dict[str, int]:
    """Inputs that index a constant table (token ids) -> the table's extent."""
    origin = {value.name: value.name for value in graph.input}
    extents: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in ("Cast", "Identity") and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        elif node.op_type == "Gather" and node.input[1] in origin and node.input[0] in weights:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            name, extent = origin[node.input[1]], weights[node.input[0]].dims[axis]
            extents[name] = min(extents.get(name, extent), extent)
    return extents


def cases(trials: int, symbolic_batch: bool) -> Iterator[tuple[str, int]]:
    """(case, batch) of each trial. The first of each case comes at another batch where the batch is symbolic."""
    for trial in range(trials):
        yield CASES[trial % len(CASES)], BATCHES[trial % len(BATCHES)] if symbolic_batch else 1


def _is_half_precision(model: onnx.ModelProto) -> bool:
    half, graph = onnx.TensorProto.FLOAT16, model.graph
    return (
        any(value.type.tensor_type.elem_type == half for value in [*graph.input, *graph.output])
        or any(tensor.data_type == half for tensor in graph.initializer)
        or any(a.name == "to" and a.i == half for n in graph.node if n.op_type == "Cast" for a in n.attribute)
    )
