"""How time and memory grow with the image: one model with windows, one with neighbourhoods, and SlideAttention alone.

    python benchmarks/growth.py                                          # 64 to 1024 pixels, one thread
    python benchmarks/growth.py --families unfold_k7 --sizes 64,128 --threads 2

Contestants run one after the other, for at the large sizes only one of them fits into memory; what does not fit, or
takes longer than the limit, is given up and said so. Memory is the peak of the first run beyond the inputs and the
output; the weights and what the engine keeps of the model are in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] != str(ROOT):
    sys.path[0] = str(ROOT)

from benchmarks import tables, zoo  # noqa: E402
from benchmarks.contest import Limits, Outcome, compete  # noqa: E402
from benchmarks.workshop import Unavailable, Workshop  # noqa: E402

CONTESTANTS = ("onnxruntime", "openvino", "compiled")
FAMILIES = ("swinir_light", "unfold_k7", "slide_core_k7")
SIZES = (64, 128, 256, 512, 1024)
BLOCK_SECONDS = 0.3


def measured(workshop: Workshop, name: str, threads: int, rounds: int, limits: Limits) -> dict[str, Any]:
    """Figures, or reasons, by contestant."""
    try:
        model = workshop.model(name)
    except Unavailable as reason:
        return {kind: Outcome(failed=f"export: {reason}").to_json() for kind in CONTESTANTS}
    figures: dict[str, Any] = {}
    artifact = None
    try:
        artifact, _ = workshop.artifact(model)
    except Unavailable as reason:
        figures["compiled"] = Outcome(failed=f"optimize: {reason}").to_json()
    kinds = [kind for kind in CONTESTANTS if kind not in figures]
    jobs = {kind: workshop.job(kind, model, threads, artifact, BLOCK_SECONDS) for kind in kinds}
    # Where inputs are as large as here, a caller who counts megabytes has them where they need not be copied.
    jobs = {kind: replace(job, aligned=True) for kind, job in jobs.items()}
    outcomes = compete(jobs, rounds=rounds, limits=limits, together=False)
    return figures | {kind: outcome.to_json() for kind, outcome in outcomes.items()}


def cells(name: str, threads: int, figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line of the table: milliseconds, then megabytes."""
    line = [name, str(threads)]
    for kind in CONTESTANTS:
        own = figures.get(kind, {})
        reason = own.get("failed", "")
        line.append(f"{own['median_ms']:.1f}" if "median_ms" in own else "failed" if ":" in reason else reason)
    for kind in CONTESTANTS:
        own = figures.get(kind, {})
        line.append(f"{own['first_mb'] - own['output_mb']:.0f}" if "first_mb" in own else "")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES), help="names without a size, separated by commas")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="pixels, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="turns of every contestant")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a contestant has for loading, or a turn")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep exports and artifacts there for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    names = [f"{family}_{size}" for family in arguments.families.split(",") for size in arguments.sizes.split(",")]
    try:
        for name in names:
            zoo.model(name)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    limits = Limits(load_seconds=arguments.limit, turn_seconds=arguments.limit)
    rows: dict[str, Any] = {}
    header = [f"{kind}, {unit}" for unit in ("ms", "MB") for kind in CONTESTANTS]
    print(tables.table(["model", "threads", *header], []), flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        workshop = Workshop(arguments.keep or Path(temporary))
        for name in names:
            rows[name] = measured(workshop, name, arguments.threads, arguments.rounds, limits)
            print(line_of(cells(name, arguments.threads, rows[name])), flush=True)
            for kind, own in rows[name].items():
                if "failed" in own:
                    print(f"{name}, {kind}: {own['failed']}", file=sys.stderr, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": arguments.threads, "rows": rows}, indent=1) + "\n")


def line_of(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


if __name__ == "__main__":
    main()
