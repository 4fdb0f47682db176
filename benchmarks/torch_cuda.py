"""What the rewrite gains inside PyTorch on a CUDA device: torch.compile with Inductor, and with attnrewrite before it.

    python benchmarks/torch_cuda.py            # Swin-T and Swin-B, float16, batch 32 and 128; needs timm and a GPU

Both run the same weights and input in one process, in turns; milliseconds are medians of CUDA events around each run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] != str(ROOT):
    sys.path[0] = str(ROOT)

from benchmarks.tables import table  # noqa: E402

MODELS = ("swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224")
WARM_UPS, TURNS, RUNS = 5, 6, 10


def events_ms(run: Callable[[], object]) -> list[float]:
    """Milliseconds of each of some runs, by the device's clock."""
    taken = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return taken


def measured(name: str, batch: int) -> list[str]:
    import timm

    module = timm.create_model(name).cuda().half().eval()
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.float16)
    contestants = {"inductor": torch.compile(module), "attnrewrite": torch.compile(module, backend="attnrewrite")}
    outputs, taken = {}, {contestant: list[float]() for contestant in contestants}
    with torch.inference_mode():
        for contestant, compiled in contestants.items():
            for _ in range(WARM_UPS):
                outputs[contestant] = compiled(x).float()
        for _ in range(TURNS):
            for contestant, compiled in contestants.items():
                taken[contestant] += events_ms(lambda compiled=compiled: compiled(x))
    medians = {contestant: statistics.median(values) for contestant, values in taken.items()}
    difference = (outputs["attnrewrite"] - outputs["inductor"]).abs().max() / outputs["inductor"].abs().max()
    ratio = medians["inductor"] / medians["attnrewrite"]
    numbers = [f"{medians[contestant]:.2f}" for contestant in contestants]
    return [name, str(batch), *numbers, f"**{ratio:.2f} x**", f"{difference:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="timm's names, separated by commas")
    parser.add_argument("--batches", default="32,128", help="batch sizes, separated by commas")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    batches = [int(batch) for batch in arguments.batches.split(",")]
    rows = [measured(name, batch) for name in arguments.models.split(",") for batch in batches]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, float16\n")
    print(table(["model", "batch", "torch.compile, ms", "attnrewrite, ms", "ratio", "difference"], rows))


if __name__ == "__main__":
    main()
