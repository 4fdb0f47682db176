"""What a CUDA kernel issues, loop by loop, counted in its machine code. No GPU is needed, but nvcc and nvdisasm.

    python -m benchmarks.cuda_sass windows-64x32 --arch sm_90               # kernels, their loops, instructions by kind
    python -m benchmarks.cuda_sass windows-64x32 --trips 5,8,16 --warps 2   # and the time to issue them
    python -m benchmarks.cuda_sass slide-7 --half

Rows are those of benchmarks.cuda_kernels, ONNX files, `windows-NxD` (4096 windows of N tokens, a square number, with
4 heads of D channels) and `neighbourhoods-KxD` (K x K on 32 maps of 56 x 56 pixels, with 3 heads of D channels); both
have a bias.

The machine code does not say how often a loop goes round. `--trips` does, one number for each loop as they are listed,
each time it is entered; then what one warp issues in all is added up, and with `--warps` (as many as a multiprocessor
executes) the time: four instructions a cycle, or 128 bytes a cycle of shared memory, at 1.7 GHz. Code under a condition
counts as executed, and nothing is waited for: these are estimates of what an H100 cannot do faster.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec
from attnrewrite.localattention.geometry import NeighborhoodGeometry, WindowGeometry
from attnrewrite.lowering.cuda_compiler import toolkits
from benchmarks.cuda_kernels import compile_cubins, models
from benchmarks.metal_traffic import op_row
from benchmarks.sass import Kernel, kinds_in_order, read_kernels, shared_bytes
from benchmarks.tables import table

ISSUED_PER_CYCLE, SHARED_BYTES_PER_CYCLE, CYCLES_PER_NS = 4, 128, 1.7


def windows(tokens: int, head_dim: int, dtype: str) -> onnx.ModelProto:
    """4096 windows that are maps of their own, as rows of benchmarks/gpu.py at the op's level."""
    heads, side = 4, math.isqrt(tokens)
    spec = FlashWindowAttention(WindowGeometry((side, side), (side, side), (0, 0)), heads, head_dim**-0.5)
    shapes = dict.fromkeys(("query", "key", "value"), (4096, side, side, heads * head_dim))
    return _op(spec, {**shapes, "bias": (1, heads, tokens, tokens)}, dtype)


def neighbourhoods(size: int, head_dim: int, dtype: str) -> onnx.ModelProto:
    """Of size x size on 32 maps of 56 x 56 pixels with 3 heads, and a bias."""
    spec = SlideAttention(NeighborhoodGeometry((56, 56), (size, size), (1, 1)), 3, head_dim**-0.5)
    shapes = dict.fromkeys(("query", "key", "value"), (32, 3 * head_dim, 56, 56))
    return _op(spec, {**shapes, "bias": (3, size * size)}, dtype)


def _op(spec: Spec, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> onnx.ModelProto:
    # Of the operands only the shapes matter.
    return op_row(
        "op", spec, {name: np.broadcast_to(np.zeros((), dtype), shape) for name, shape in shapes.items()}
    ).model


_ROWS = {r"windows-(\d+)x(\d+)": windows, r"neighbourhoods-(\d+)x(\d+)": neighbourhoods}


def rows(names: Iterable[str], dtype: str) -> dict[str, onnx.ModelProto]:
    """The rows of these names, or whose names begin so."""
    found: dict[str, onnx.ModelProto] = {}
    for name in names:
        own = next(((make, m) for pattern, make in _ROWS.items() if (m := re.fullmatch(pattern, name))), None)
        if own is None:
            found |= models([name], dtype)
        else:
            make, numbers = own
            found[name] = make(int(numbers[1]), int(numbers[2]), dtype)
    return found


def find_disassembler() -> Path:
    """nvdisasm on PATH, of a toolkit, or from its pip package. Raises SystemExit where there is none."""
    if on_path := shutil.which("nvdisasm"):
        return Path(on_path)
    packages = [package for entry in sys.path for package in (Path(entry) / "nvidia").glob("*")]
    for folder in [*toolkits(), *packages]:
        if (found := folder / "bin" / "nvdisasm").exists():
            return found
    raise SystemExit("no nvdisasm found: it is in the CUDA toolkit, and in `pip install nvidia-cuda-nvdisasm`")


def disassemble(cubin: bytes) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(cubin)
        command = [str(find_disassembler()), "-c", str(path)]
        return read_kernels(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def loops_table(kernel: Kernel) -> str:
    """A line for each loop: where it is, instructions of its own (without the loops within it), and of what kinds."""
    kinds = kinds_in_order(loop.own for loop in kernel.loops)
    lines = [
        [
            "· " * loop.depth + f"{loop.first:x}-{loop.last:x}",
            *_cells(loop.own, kinds),
        ]
        for loop in kernel.loops
    ]
    return table(["loop", "in all", "multiply-adds", *kinds], lines)


def _cells(counts: Mapping[str, int], kinds: Iterable[str]) -> list[str]:
    total = sum(counts.values())
    share = counts.get("FFMA", 0) / max(total, 1)
    return [str(total), f"{share:.0%}", *(str(counts.get(kind, "")) for kind in kinds)]


def time_line(counts: Mapping[str, int], warps: int) -> str:
    """Of all warps, on one multiprocessor."""
    issue = sum(counts.values()) * warps / ISSUED_PER_CYCLE / CYCLES_PER_NS
    shared = shared_bytes(counts) * warps / SHARED_BYTES_PER_CYCLE / CYCLES_PER_NS
    return f"{warps} warps: {issue:.0f} ns to issue, {shared:.0f} ns of shared memory"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="windows-NxD, neighbourhoods-KxD, or rows of benchmarks.cuda_kernels")
    parser.add_argument("--half", action="store_true", help="float16")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--trips", type=_numbers, help="how often each loop goes round, as in 5,8,16")
    parser.add_argument("--warps", type=int, default=1)
    options = parser.parse_args(None if arguments is None else list(arguments))
    find_disassembler()
    for row, model in rows(options.rows, "float16" if options.half else "float32").items():
        for cubin in compile_cubins(model, options.arch).cubins:
            for kernel in disassemble(cubin):
                print(f"\n{row}, {kernel.name}\n\n{loops_table(kernel)}")
                if options.trips is not None:
                    counts = kernel.issued(options.trips)
                    kinds = kinds_in_order([counts])
                    print(f"\n{table(['issued by a warp', 'FFMA', *kinds], [_cells(counts, kinds)])}")
                    print(f"\n{time_line(counts, options.warps)}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


if __name__ == "__main__":
    main()
