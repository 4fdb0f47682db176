"""What every CUDA kernel takes of a GPU, as the compiler says it: registers, shared memory, spills. No GPU is needed.

    python -m benchmarks.cuda_kernels                              # every row, for every preset; takes minutes
    python -m benchmarks.cuda_kernels window-7 slide --half        # some rows, in float16
    python -m benchmarks.cuda_kernels swin.onnx --presets sm_90    # the kernels of a model, rewritten or not

Rows are single operators, compiled as a model of one operator is: what the table lists is what that leaves as kernels.
A register count is of a thread, shared memory of a block. The command fails where a kernel spills registers to memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from attnrewrite.lowering.cuda_compiler import EmbeddedCubins, embedded_cubins
from attnrewrite.lowering.cuda_resources import KernelResources
from attnrewrite.lowering.targets import CUDA_PRESETS, parse_target
from benchmarks.metal_traffic import ROWS, op_row
from benchmarks.tables import line, table
from tests.metal.cases import SLIDES, WINDOWS, Case


@dataclass(frozen=True)
class Kernel:
    """A kernel of a row. resources: by preset."""

    row: str
    name: str
    resources: Mapping[str, KernelResources]


def rows() -> dict[str, Callable[[str], onnx.ModelProto]]:
    """What makes the model of each row, from its dtype."""
    cases = {f"tried-window-{name}": case for name, case in WINDOWS.items()}
    cases |= {f"tried-slide-{name}": case for name, case in SLIDES.items()}
    found = {name: lambda dtype, make=make: make(dtype).model for name, make in ROWS.items()}
    return found | {name: lambda dtype, name=name, case=case: _model(name, case, dtype) for name, case in cases.items()}


def models(wanted: Sequence[str], dtype: str) -> dict[str, onnx.ModelProto]:
    """The rows whose names are, or start with, one of these; all for none. Paths of ONNX files are rows as well."""
    files = [name for name in wanted if name.endswith(".onnx")]
    beginnings = tuple(name for name in wanted if name not in files)
    found = {Path(file).stem: onnx.load(file) for file in files}
    if files and not beginnings:
        return found
    return found | {name: make(dtype) for name, make in rows().items() if name.startswith(beginnings or "")}


def _model(name: str, case: Case, dtype: str) -> onnx.ModelProto:
    return op_row(name, case.spec, {n: a.astype(dtype) for n, a in case.operands.items()}).model


def compile_kernels(model: onnx.ModelProto, preset: str) -> tuple[KernelResources, ...]:
    """What is left of a model as kernels, for one architecture. Raises CompilerError without a CUDA compiler."""
    return tuple(compile_cubins(model, preset).kernels)


def compile_cubins(model: onnx.ModelProto, preset: str) -> EmbeddedCubins:
    """The same, with their machine code."""
    from attnrewrite.lowering import build, importer
    from attnrewrite.lowering.kernels.coverage import covers
    from attnrewrite.lowering.written_out import write_out

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    target = parse_target(f"cuda:{preset}")
    tvm_target = build.tvm_target(target)
    write_out(copy, lambda spec, present: covers(spec, present, "cuda"))
    with embedded_cubins(target.architectures) as embedded:
        build.build(importer.import_onnx(copy, target, tvm_target), tvm_target)
    return embedded


def kernels_of(row: str, model: onnx.ModelProto, presets: Sequence[str]) -> list[Kernel]:
    """By name; a kernel that one preset has and another has not is listed with what there is."""
    found: dict[str, dict[str, KernelResources]] = {}
    for preset in presets:
        for resources in compile_kernels(model, preset):
            found.setdefault(resources.name, {})[preset] = resources
    return [Kernel(row, name, by_preset) for name, by_preset in sorted(found.items())]


def cells(kernel: Kernel, presets: Sequence[str]) -> list[str]:
    """The line of the table: registers by preset, and where registers spill, the bytes stored and loaded."""
    shared = max(r.shared_bytes for r in kernel.resources.values())
    return [kernel.row, kernel.name, f"{shared / 1024:.1f}", *(_registers(kernel.resources.get(p)) for p in presets)]


def _registers(resources: KernelResources | None) -> str:
    if resources is None:
        return ""
    spills = f" (spills {resources.spill_stores}, {resources.spill_loads})" if resources.spills else ""
    return f"{resources.registers}{spills}"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names of rows or their beginnings, or ONNX files")
    parser.add_argument("--half", action="store_true", help="float16")
    parser.add_argument("--presets", default=",".join(CUDA_PRESETS), help="architectures, separated by commas")
    options = parser.parse_args(None if arguments is None else list(arguments))
    presets = options.presets.split(",")
    found: list[Kernel] = []
    print(table(["row", "kernel", "shared, KB", *presets], []))
    for row, model in models(options.rows, "float16" if options.half else "float32").items():
        kernels = kernels_of(row, model, presets)
        found += kernels
        for kernel in kernels:
            print(line(cells(kernel, presets)), flush=True)
    spilling = [k for k in found if any(r.spills for r in k.resources.values())]
    if spilling:
        raise SystemExit(f"{len(spilling)} of {len(found)} kernels spill registers: {', '.join(_names(spilling))}")


def _names(kernels: Iterable[Kernel]) -> list[str]:
    return [f"{kernel.row}/{kernel.name}" for kernel in kernels]


if __name__ == "__main__":
    main()
