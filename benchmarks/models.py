"""Original, rewritten and compiled models against each other, as a Markdown table of medians and ratios.

    python benchmarks/models.py                                  # every model, one thread and two
    python benchmarks/models.py --models unfold_k3 --threads 1

Each row is one run of `attnrewrite bench`'s measurement: one process, the same input, the contestants in turns. Models
are exported by the examples, with random weights; `rewrite` is what reading, matching, proving and rewriting took.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from exporting import export, import_torchvision

import attnrewrite
from attnrewrite import bench

BATCH_ONE = (1, 3, 224, 224)


def _timm(name: str) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        import_torchvision()
        import timm

        return timm.create_model(name, pretrained=False)

    return build


def _unfold(kernel_size: int) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        from models.unfold_attention import UnfoldAttention

        return UnfoldAttention(96, 3, kernel_size)

    return build


def _slide_swin() -> torch.nn.Module:
    from models.slide_transformer import slide_swin_tiny

    return slide_swin_tiny()


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "unfold_k3": (_unfold(3), (1, 96, 56, 56)),
    "unfold_k5": (_unfold(5), (1, 96, 56, 56)),
    "unfold_k7": (_unfold(7), (1, 96, 56, 56)),
    "swin_tiny": (_timm("swin_tiny_patch4_window7_224"), BATCH_ONE),
    "swinv2_tiny": (_timm("swinv2_tiny_window8_256"), (1, 3, 256, 256)),
    "slide_swin_tiny": (_slide_swin, BATCH_ONE),
}


def measured(path: Path, threads: int) -> dict[str, Any]:
    """One row: seconds of the rewrite, and medians in milliseconds by contestant."""
    result = attnrewrite.optimize(path, target="cpu", threads=threads, verify=False)
    directory = result.save(path.parent / f"{path.stem}-{threads}")
    timings = bench.measure(
        bench.contestants(Path(directory), ("original", "onnxruntime"), path, threads), bench.example_inputs(path)
    )
    rewrite = result.report.seconds["read"] + result.report.seconds["rewrite"]
    return {"rewrite": rewrite} | {t.name: t.median_ms for t in timings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    arguments = parser.parse_args()
    print("| model | threads | rewrite, s | original, ms | rewritten, ms | compiled, ms | rewritten | compiled |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.models.split(","):
        build, shape = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            path = export(build().eval(), (torch.randn(shape),), Path(folder) / f"{name}.onnx")
            for threads in map(int, arguments.threads.split(",")):
                row = measured(path, threads)
                speedups = " | ".join(f"{row['original'] / row[k]:.2f} x" for k in ("rewritten", "compiled"))
                times = " | ".join(f"{row[k]:.1f}" for k in ("original", "rewritten", "compiled"))
                print(f"| {name} | {threads} | {row['rewrite']:.2f} | {times} | {speedups} |", flush=True)


if __name__ == "__main__":
    main()
