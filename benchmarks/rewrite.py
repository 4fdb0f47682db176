"""What a rewrite costs: seconds and peak memory of `attnrewrite optimize --no-compile`, in a child process per row.

    python benchmarks/rewrite.py                              # every model; the large ones take 6 GB to export
    python benchmarks/rewrite.py --models depth-4,depth-16    # some
    python benchmarks/rewrite.py --verify                     # with the numeric verification, which runs both models

Rows `depth-N` (N blocks, one image size) and `image-N` (one depth, N x N pixels) show how the cost grows. The allowance
is 200 MB and three times the model's file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

ALLOWANCE_MB, ALLOWANCE_PER_BYTE = 200, 3
MEGABYTE = 1e6


def _timm(name: str, **options: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        from exporting import import_torchvision

        import_torchvision()
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build


def _swin(depth: int, size: int) -> tuple[Callable[[], torch.nn.Module], tuple[int, ...]]:
    options = {"window_size": 8, "embed_dim": 48, "depths": (depth,), "num_heads": (3,), "num_classes": 10}
    return _timm("swin_tiny_patch4_window7_224", img_size=size, **options), (1, 3, size, size)


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "swin_large_384": (_timm("swin_large_patch4_window12_384"), (1, 3, 384, 384)),
    "sam_base_1024": (_timm("samvit_base_patch16"), (1, 3, 1024, 1024)),
    **{f"depth-{depth}": _swin(depth, 256) for depth in (4, 8, 16, 32)},
    **{f"image-{size}": _swin(4, size) for size in (256, 512, 1024)},
}


def exported(name: str, path: Path) -> None:
    """Write a model to a file. In a process of its own: a child's peak memory is never below that of its parent."""
    import torch
    from exporting import export

    build, shape = MODELS[name]
    torch.manual_seed(0)
    export(build().eval(), (torch.randn(shape),), path, exporter="torchscript")


def measured(model: Path, verify: bool) -> dict[str, Any]:
    """Wall and CPU seconds and peak resident memory (MB) of one run, with the report it printed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "attnrewrite", "optimize", str(model), "--no-compile", "--json"]
        command += ["-o", f"{folder}/rewritten", *([] if verify else ["--no-verify"])]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            document = json.loads(child.stdout.read())
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"optimize {model} ended with {child.returncode}")
    peak = usage.ru_maxrss * 1024 / MEGABYTE
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak": peak, "report": document}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--folder", type=Path, help="where exported models are kept; a temporary folder by default")
    parser.add_argument("--verify", action="store_true", help="with the numeric verification")
    arguments = parser.parse_args()
    print("| model | file, MB | sites | rewritten | seconds | CPU seconds | read | rewrite | peak, MB | allowed, MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for name in arguments.models.split(","):
            path = folder / f"{name}.onnx"
            if not path.exists():
                child = multiprocessing.get_context("spawn").Process(target=exported, args=(name, path))
                child.start()
                child.join()
            if not path.exists():
                raise SystemExit(f"{name} was not exported")
            row = measured(path, arguments.verify)
            size = path.stat().st_size / MEGABYTE
            sites = row["report"]["sites"]
            rewritten = sum(s["verdict"] == "rewrite" for s in sites)
            stages = row["report"]["seconds"]
            print(
                f"| {name} | {size:.0f} | {len(sites)} | {rewritten} | {row['seconds']:.1f} | {row['cpu']:.1f} "
                f"| {stages['read']:.1f} | {stages['rewrite']:.1f} | {row['peak']:.0f} "
                f"| {ALLOWANCE_MB + ALLOWANCE_PER_BYTE * size:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
