"""What the rewrite gains inside PyTorch on the CPU: eager and torch.compile, the original and the rewritten model.

    python benchmarks/torch_models.py                                          # one thread and two
    python benchmarks/torch_models.py --models swin_tiny --threads 1 --keep build/bench

`torch` and `torch-compile` (Inductor) run the original; `torch-rewritten` is `attnrewrite.optimize(...).module`,
`torch-attnrewrite` is `torch.compile(model, backend="attnrewrite")`. They take turns on the same input, each in
its own process.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] != str(ROOT):
    # This directory is on the path as the script's own, and its modules are not to be found twice.
    sys.path[0] = str(ROOT)

from benchmarks import machine  # noqa: E402
from benchmarks.contest import Limits, Outcome, compete  # noqa: E402
from benchmarks.tables import table  # noqa: E402
from benchmarks.workshop import Workshop  # noqa: E402

ORIGINALS = ("torch", "torch-compile")
REWRITTEN = ("torch-rewritten", "torch-attnrewrite")
MODELS = ("unfold_k3_56", "unfold_k7_56", "swin_tiny", "swin_base", "swinv2_tiny")
BLOCK_SECONDS = 1.0


def cells(model: str, threads: int, outcomes: Mapping[str, Outcome]) -> list[str]:
    """Medians, and how many times faster each rewritten form is than each original."""
    median = {
        name: None if outcome.failed else float(outcome.to_json()["median_ms"]) for name, outcome in outcomes.items()
    }
    row = [model, str(threads)]
    for name in (*ORIGINALS, *REWRITTEN):
        taken = median[name]
        row.append(f"{outcomes[name].failed}" if taken is None else f"{taken:.2f}")
    for ours in REWRITTEN:
        for theirs in ORIGINALS:
            a, b = median[theirs], median[ours]
            row.append("" if a is None or b is None else f"**{a / b:.2f} x**")
    return row


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    parser.add_argument("--rounds", type=int, default=4, help="turns of every contestant")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds a contestant may take to compile")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread on a busy machine")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep exports there for the next run")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        workshop = Workshop(arguments.keep or Path(temporary))
        for name in arguments.models.split(","):
            model = workshop.model(name)
            for threads in map(int, arguments.threads.split(",")):
                jobs = {
                    kind: workshop.job(kind, model, threads, None, BLOCK_SECONDS, arguments.clock)
                    for kind in (*ORIGINALS, *REWRITTEN)
                }
                limits = Limits(load_seconds=arguments.limit, turn_seconds=arguments.limit)
                rows.append(cells(name, threads, compete(jobs, rounds=arguments.rounds, limits=limits)))
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    print(f"{datetime.date.today()}, {machine.description()}. {versions}.\n")
    ratios = [f"{ours.removeprefix('torch-')} / {theirs}" for ours in REWRITTEN for theirs in ORIGINALS]
    print(table(["model", "threads", *(f"{n}, ms" for n in (*ORIGINALS, *REWRITTEN)), *ratios], rows))


if __name__ == "__main__":
    main()
