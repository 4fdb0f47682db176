"""Original, rewritten and compiled models against each other: speed, roofline and peak memory, as Markdown tables.

    python benchmarks/models.py                                                    # every model, one thread and two
    python benchmarks/models.py --models swin_tiny --threads 1 --peers onnxruntime,openvino --keep build/bench
    python benchmarks/models.py --print results.json                               # the tables of an earlier run

Contestants of a row take turns on the same input, each in its own process. `onnxruntime`, `openvino`, `torch` and
`torch-compile` run the original, `rewritten` is the delivered model.onnx in ONNX Runtime, and the compiled artifact
always takes part.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] != str(ROOT):
    # This directory is on the path as the script's own, and its modules are not to be found twice.
    sys.path[0] = str(ROOT)

from benchmarks import machine, tables, zoo  # noqa: E402
from benchmarks.contest import Limits, Outcome, compete  # noqa: E402
from benchmarks.flops import work_of  # noqa: E402
from benchmarks.workshop import Unavailable, Workshop  # noqa: E402

PEERS = tuple(name for name in tables.CONTESTANTS if name != "compiled")
GEMM_BLOCK_SECONDS = 0.3
BLOCK_SECONDS = 1.0


def peak_of(workshop: Workshop, threads: int, clock: str) -> dict[str, Any]:
    """The fastest matrix product of the machine, and its copy bandwidth."""
    jobs, shapes = {}, {}
    for shape in machine.GEMM_SHAPES:
        model = workshop.gemm(*shape)
        for engine in machine.GEMM_ENGINES:
            artifact = workshop.artifact(model)[0] if engine == "compiled" else None
            name = f"{engine}-{model.stem}"
            jobs[name] = workshop.job(engine, model, threads, artifact, GEMM_BLOCK_SECONDS, clock)
            shapes[name] = (engine, shape)
    outcomes = compete(jobs)
    rates = {
        name: machine.gemm_flops(*shapes[name][1]) / (outcome.to_json()["median_ms"] / 1e3)
        for name, outcome in outcomes.items()
        if outcome.failed is None
    }
    if not rates:
        raise SystemExit(f"no engine computes a matrix product: {next(iter(outcomes.values())).failed}")
    engine, shape = shapes[max(rates, key=lambda name: rates[name])]
    by_engine = {e: round(max(r for n, r in rates.items() if shapes[n][0] == e) / 1e9, 1) for e, _ in shapes.values()}
    copied = machine.copy_bandwidth(threads)
    return {
        "gflops": round(max(rates.values()) / 1e9, 1),
        "engines": by_engine,
        "engine": engine,
        "shape": f"{machine.CHAIN} products of {shape[0]} x {shape[1]} x {shape[1]}",
        "rows": shape[0],
        "columns": shape[1],
        "copy_gbs": round(copied / 1e9, 1),
    }


def measured(
    workshop: Workshop,
    name: str,
    threads: int,
    peers: Sequence[str],
    rounds: int,
    limits: Limits,
    peak: Any,
    clock: str = "wall",
) -> dict[str, Any]:
    """One row of the document that `tables` prints. Raises Unavailable where the model cannot be exported."""
    model = workshop.model(name)
    row: dict[str, Any] = {"model": name, "threads": threads}
    broken: dict[str, str] = {}
    artifact: Path | None = None
    try:
        artifact, row["artifact"] = workshop.artifact(model)
    except Unavailable as reason:
        broken["compiled"] = f"optimize: {reason}"
        try:
            artifact, _ = workshop.artifact(model, compiled=False)
        except Unavailable as again:
            broken["rewritten"] = f"optimize: {again}"
    kinds = [kind for kind in tables.CONTESTANTS if kind in (*peers, "compiled") and kind not in broken]
    jobs = {kind: workshop.job(kind, model, threads, artifact, BLOCK_SECONDS, clock) for kind in kinds}
    if peak is not None:
        gemm = workshop.gemm(peak["rows"], peak["columns"])
        own = workshop.artifact(gemm)[0] if peak["engine"] == "compiled" else None
        jobs["gemm"] = workshop.job(peak["engine"], gemm, threads, own, GEMM_BLOCK_SECONDS, clock)
    outcomes = compete(jobs, rounds=rounds, limits=limits)
    gemm_outcome = outcomes.pop("gemm", None)
    if gemm_outcome is not None and gemm_outcome.failed is None:
        flops = machine.gemm_flops(peak["rows"], peak["columns"])
        row["gemm_gflops"] = round(flops / (gemm_outcome.to_json()["median_ms"] / 1e3) / 1e9, 1)
    if peak is not None and artifact is not None:
        row["work"] = work_of(artifact / "model.onnx").to_json()
    outcomes |= {kind: Outcome(failed=reason) for kind, reason in broken.items() if kind in (*peers, "compiled")}
    row["contestants"] = {kind: outcomes[kind].to_json() for kind in tables.CONTESTANTS if kind in outcomes}
    return row


def continued(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A new document with the peaks and rows of an earlier one; without them where machine or clock is another."""
    if any(earlier["machine"][key] != new["machine"][key] for key in ("description", "clock")):
        return new
    return {**earlier, "machine": new["machine"]}


def merged(document: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The document with one row added, in place of an older one of the same model and thread count."""
    same = [(r["model"], r["threads"]) == (row["model"], row["threads"]) for r in document["rows"]]
    rows = [row if replaced else r for r, replaced in zip(document["rows"], same, strict=True)]
    return {**document, "rows": rows if any(same) else [*rows, row]}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(zoo.MEASURED), help="names, separated by commas")
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    parser.add_argument("--peers", default=",".join(PEERS), help="contestants beside the compiled model")
    parser.add_argument("--rounds", type=int, default=4, help="turns of every contestant")
    parser.add_argument(
        "--limit", type=float, default=240.0, help="seconds a contestant may take to load, or for a turn"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread on a busy machine")
    parser.add_argument("--no-roofline", action="store_true", help="do not measure what the machine can do")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep exports and artifacts there for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to those of this file")
    parser.add_argument("--print", type=Path, metavar="FILE", help="only print the tables of such a file")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    if arguments.print:
        print(tables.markdown(json.loads(arguments.print.read_text())))
        return
    peers = [peer for peer in arguments.peers.split(",") if peer]
    if unknown := [peer for peer in peers if peer not in PEERS]:
        raise SystemExit(f"there is no peer {unknown[0]!r}; the peers are {', '.join(PEERS)}")
    try:
        names = [name for name in arguments.models.split(",") if zoo.model(name)]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if arguments.clock == "cpu" and arguments.threads != "1":
        raise SystemExit("--clock cpu counts the waiting of several threads as work: use it with --threads 1")
    limits = Limits(load_seconds=arguments.limit, turn_seconds=arguments.limit)
    about: dict[str, Any] = {
        "description": machine.description(),
        "date": f"{datetime.date.today()}",
        "versions": machine.versions(),
    }
    about["clock"] = arguments.clock
    document: dict[str, Any] = {"machine": about, "peaks": {}, "rows": []}
    if arguments.json and arguments.json.exists():
        document = continued(json.loads(arguments.json.read_text()), document)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        workshop = Workshop(arguments.keep or Path(temporary))
        counts = [int(count) for count in arguments.threads.split(",")]
        if not arguments.no_roofline:
            for threads in (count for count in counts if str(count) not in document["peaks"]):
                _say(f"measuring the machine, {tables.counted(threads)}")
                document["peaks"][str(threads)] = peak_of(workshop, threads, arguments.clock)
        for name in names:
            for threads in counts:
                _say(f"{name}, {tables.counted(threads)}")
                peak = None if arguments.no_roofline else document["peaks"][str(threads)]
                try:
                    row = measured(workshop, name, threads, peers, arguments.rounds, limits, peak, arguments.clock)
                except Unavailable as reason:
                    row = {"model": name, "threads": threads, "contestants": {"export": {"failed": str(reason)}}}
                document = merged(document, row)
                _say("| " + " | ".join(tables.speed_cells(row)) + " |")
                if arguments.json:
                    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(tables.markdown(document))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
