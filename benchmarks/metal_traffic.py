"""Device-memory traffic of the Metal kernels, counted in the emulator: no Mac, and no timing.

    python -m benchmarks.metal_traffic                     # every row
    python -m benchmarks.metal_traffic window gemm --half  # some kinds, in float16
    python -m benchmarks.metal_traffic slide-7 --launches  # one row, and what each launch of it moves

Bytes are given as multiples of the least possible: every input read once, every output written once. *moved* counts
what threads ask for, *per group* what a threadgroup touches, once; what lies between is for caches to find. *original*
is the same computation compiled from standard operators, as the op's body spells it, and *gain* how many times more
of those bytes it moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import helper

from attnrewrite.functions.spec import DOMAIN, FlashWindowAttention, SlideAttention, Spec
from attnrewrite.localattention.geometry import KeyWindows, NeighborhoodGeometry, WindowGeometry
from benchmarks.tables import table

HEADS, HEAD_DIM = 3, 32
CHANNELS = HEADS * HEAD_DIM
OPSET = 17
# Largest difference between a row's two forms, of the largest output: in float16 the original rounds between operators,
# by which SAM's is off by 1.2e-2 (ours by 4e-4).
SAME = {"float32": 1e-5, "float16": 2e-2}

# Tokens, input and output channels of every linear layer of Swin-T at 224 x 224.
SWIN_TINY = [
    (size * size, inner, outer)
    for size, dim in ((56, 96), (28, 192), (14, 384), (7, 768))
    for inner, outer in ((dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim))
]

Operands = dict[str, np.ndarray]


@dataclass(frozen=True)
class Moved:
    """Bytes that one run moves, what each of its launches does, and what it computes."""

    requested: int
    per_group: int
    least: int
    launches: tuple[str, ...]
    output: np.ndarray

    @property
    def ratio(self) -> float:
        return self.requested / self.least


@dataclass(frozen=True)
class Row:
    """A model of one operator, and its operands. spec: of the op; None for an operator of ONNX's own."""

    name: str
    model: onnx.ModelProto
    operands: Operands
    spec: Spec | None = None


def window(
    size: int, dtype: str, name: str = "", *, keys: int = 0, extent: int = 0, heads: int = HEADS, dim: int = HEAD_DIM
) -> Row:
    """Shifted windows of `size` a side with bias and mask; with `keys`, unshifted ones whose keys overlap.

    extent: of the map, some windows if 0. dim: of a head.
    """
    extent = extent or size * (8 if size <= 8 else 2)
    geometry = WindowGeometry((extent, extent), (size, size), (0 if keys else size // 2,) * 2)
    key_tokens = size * size
    if keys:
        halo = KeyWindows((extent, extent), (keys, keys), (size, size), ((size - keys) // 2,) * 2, (1, 1))
        geometry = WindowGeometry(geometry.feature_size, geometry.window_size, geometry.shift_size, False, halo)
        key_tokens = keys * keys
    spec = FlashWindowAttention(geometry, heads, dim**-0.5, None if keys else -100.0)
    operands = _maps((1, extent, extent, heads * dim), dtype)
    operands["bias"] = _random((1, heads, size * size, key_tokens), dtype)
    return op_row(name or f"window-{size}" + (f"-keys-{keys}" if keys else ""), spec, operands)


def sam(size: int, extent: int, dtype: str) -> Row:
    """The image encoder of SAM: a table per axis that all heads share; one window where size and extent are equal."""
    heads, dim = 2, 64
    spec = FlashWindowAttention(WindowGeometry((extent, extent), (size, size), (0, 0)), heads, dim**-0.5)
    operands = _maps((1, extent, extent, heads * dim), dtype)
    if extent % size:
        operands |= {name: _random((heads * dim,), dtype) for name in ("key_padding", "value_padding")}
    operands["relative_position"] = _random((1, 2 * size * size, dim), dtype)
    return op_row(f"sam-{size}", spec, operands)


def slide(size: int, dtype: str) -> Row:
    """Neighbourhoods of `size` a side with a bias, on a map of 56 x 56."""
    spec = SlideAttention(NeighborhoodGeometry((56, 56), (size, size), (1, 1)), HEADS, HEAD_DIM**-0.5)
    operands = _maps((1, CHANNELS, 56, 56), dtype)
    operands["bias"] = _random((HEADS, size * size), dtype)
    return op_row(f"slide-{size}", spec, operands)


def learned(extent: int, dtype: str) -> Row:
    """Slide-Swin-T's neighbourhoods of 3 x 3 with kernels that all heads share, on a map of `extent` a side."""
    heads = HEADS * 56 // extent
    spec = SlideAttention(NeighborhoodGeometry((extent, extent), (3, 3), (1, 1)), heads, HEAD_DIM**-0.5)
    operands = _maps((1, heads * HEAD_DIM, extent, extent), dtype)
    for operand in ("key", "value"):
        operands[f"{operand}_kernel"] = _random((HEAD_DIM, 9, 3, 3), dtype)
        operands[f"{operand}_bias"] = _random((HEAD_DIM, 9), dtype)
    return op_row(f"learned-{extent}", spec, operands)


def volo(dtype: str) -> Row:
    """VOLO's outlook attention: 3 x 3 blocks with predicted logits, every other pixel, added up."""
    geometry = NeighborhoodGeometry((14, 14), (3, 3), (1, 1), stride=(2, 2), key_size=(28, 28))
    spec = SlideAttention(geometry, 6, HEAD_DIM**-0.5, predicted="logits", overlap_add=True)
    operands = {"value": _random((1, 6 * HEAD_DIM, 28, 28), dtype), "logits": _random((1, 6 * 81, 14, 14), dtype)}
    return op_row("volo", spec, operands)


def gemm(tokens: int, inner: int, outer: int, dtype: str) -> Row:
    """A linear layer with its bias."""
    operands = {"x": _random((1, tokens, inner), dtype), "w": _random((inner, outer), dtype)}
    operands["b"] = _random((outer,), dtype)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["output"])]
    return Row(f"gemm-{tokens}x{inner}x{outer}", _model(nodes, operands), operands)


ROWS: dict[str, Callable[[str], Row]] = {
    **{f"window-{size}": lambda dtype, size=size: window(size, dtype) for size in (4, 6, 7, 8, 12, 16, 24)},
    "window-16-keys-24": lambda dtype: window(16, dtype, keys=24),
    "swinir-light": lambda dtype: window(8, dtype, "swinir-light", extent=64, heads=6, dim=10),
    "swinir": lambda dtype: window(8, dtype, "swinir", extent=64, heads=6, dim=30),
    "hat": lambda dtype: window(16, dtype, "hat", extent=64, heads=6, dim=30),
    "hat-keys-24": lambda dtype: window(16, dtype, "hat-keys-24", keys=24, extent=64, heads=6, dim=30),
    "sam-14": lambda dtype: sam(14, 64, dtype),
    "sam-32": lambda dtype: sam(32, 32, dtype),
    "sam-64": lambda dtype: sam(64, 64, dtype),
    **{f"slide-{size}": lambda dtype, size=size: slide(size, dtype) for size in (3, 7)},
    **{f"learned-{extent}": lambda dtype, extent=extent: learned(extent, dtype) for extent in (56, 28, 14, 7)},
    "volo": volo,
    **{
        f"gemm-{tokens}x{inner}x{outer}": lambda dtype, shape=(tokens, inner, outer): gemm(*shape, dtype)
        for tokens, inner, outer in SWIN_TINY
    },
}  # fmt: skip


def measure(row: Row, *, original: bool = False) -> Moved:
    """What a row moves, compiled for Metal. original: with the op written out in standard operators first.

    Raises AssertionError where the emulator finds a fault.
    """
    from attnrewrite.emulator import metal_target, run_model
    from attnrewrite.lowering import importer
    from attnrewrite.lowering.kernels.coverage import covers
    from attnrewrite.lowering.targets import parse_target
    from attnrewrite.lowering.written_out import write_out

    model = onnx.ModelProto()
    model.CopyFrom(row.model)
    write_out(model, (lambda *_: False) if original else partial(covers, device="metal"))
    run = run_model(importer.import_onnx(model, parse_target("metal"), metal_target()), list(row.operands.values()))
    assert run.findings == (), run.findings
    least = sum(array.nbytes for array in (*row.operands.values(), *run.outputs))
    per_group = sum(b.reads.per_group + b.writes.per_group for launch in run.launches for b in launch.buffers)
    requested = sum(launch.requested for launch in run.launches)
    return Moved(requested, per_group, least, tuple(map(str, run.launches)), run.outputs[0])


def rows_named(names: Iterable[str], dtype: str) -> list[Row]:
    """The rows whose names are, or start with, one of these; all for none."""
    wanted = tuple(names)
    return [make(dtype) for name, make in ROWS.items() if not wanted or name in wanted or name.startswith(wanted)]


def cells(row: Row) -> tuple[list[str], Moved]:
    """The line of the table, and what the row itself moves."""
    moved = measure(row)
    found = [row.name, f"{moved.least / 1e6:.2f}", f"{moved.ratio:.2f}", f"{moved.per_group / moved.least:.2f}"]
    if row.spec is None:
        return [*found, "", ""], moved
    before = measure(row, original=True)
    difference = np.abs(moved.output.astype(np.float64) - before.output).max() / np.abs(before.output).max()
    assert difference <= SAME[str(moved.output.dtype)], f"{row.name}: the two differ by {difference}"
    return [*found, f"{before.ratio:.1f}", f"{before.ratio / moved.ratio:.1f}"], moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}, or their beginnings")
    parser.add_argument("--half", action="store_true", help="float16")
    parser.add_argument("--launches", action="store_true", help="what each launch moves")
    arguments = parser.parse_args()
    lines, details = [], []
    for row in rows_named(arguments.rows, "float16" if arguments.half else "float32"):
        line, moved = cells(row)
        lines.append(line)
        details += [f"\n{row.name}", *moved.launches] if arguments.launches else []
    print(table(["row", "least, MB", "moved", "per group", "original", "gain"], lines))
    print("\n".join(details))


def op_row(name: str, spec: Spec, operands: Operands) -> Row:
    """One of the two ops as a model."""
    from attnrewrite.frontend.onnx import read, to_model

    names = [operand if operand in operands else "" for operand in spec.operands]
    while not names[-1]:
        names.pop()
    outputs = ["output", "output_1"] if "extra_query" in operands else ["output"]
    node = helper.make_node(spec.op_type, names, outputs, name="op", domain=DOMAIN, **spec.attributes())
    return Row(name, to_model(read(_model([node], operands))), operands, spec)


def _model(nodes: list[onnx.NodeProto], operands: Operands) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in operands.items()
    ]
    kind = helper.np_dtype_to_tensor_dtype(next(iter(operands.values())).dtype)
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in nodes[-1].output]
    graph = helper.make_graph(nodes, "row", inputs, outputs)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _maps(shape: tuple[int, ...], dtype: str) -> Operands:
    return {name: _random(shape, dtype) for name in ("query", "key", "value")}


def _random(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


if __name__ == "__main__":
    main()
