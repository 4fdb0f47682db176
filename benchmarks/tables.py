"""The figures of a run as Markdown tables. A run is a JSON document:

{"machine": {"description", "date", "clock", "versions"},
 "peaks": {threads: {"gflops", "engine", "shape", "copy_gbs"}},
 "rows": [{"model", "threads", "contestants": {name: figures or {"failed": reason}}, "gemm_gflops",
           "work": {"products", "attention", "compulsory", "moved"}, "artifact": {"seconds", ...}}]}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.contest import best_peer

PEERS = ("onnxruntime", "openvino", "torch", "torch-compile")
CONTESTANTS = (*PEERS, "rewritten", "compiled")
# Outputs of two float32 implementations of a deep model differ by less than this share of the largest one.
SUSPICIOUS = 1e-3

Row = Mapping[str, Any]


def markdown(document: Mapping[str, Any]) -> str:
    """Every table that the document has figures for, with a line about the machine above."""
    rows = document["rows"]
    parts = [_heading(document), speed(rows), *_footnotes(rows)]
    if any("work" in row for row in rows):
        parts += ["### Roofline", _peaks(document["peaks"]), roofline(rows, document["peaks"])]
    parts += ["### Peak memory, MB beyond what importing the engine takes", peak_memory(rows)]
    if any("artifact" in row for row in rows):
        parts += ["### Compiling", artifacts(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def line(row: Sequence[str]) -> str:
    """Of a table."""
    return "| " + " | ".join(row) + " |"


def speed(rows: Sequence[Row]) -> str:
    """Medians in milliseconds, and how many times faster the compiled model is than each original."""
    header = [
        "model",
        "threads",
        *(f"{name}, ms" for name in CONTESTANTS),
        "/ onnxruntime",
        "/ openvino",
        "/ best peer",
    ]
    return table(header, map(speed_cells, rows))


def speed_cells(row: Row) -> list[str]:
    figures = row["contestants"]
    cells = [row["model"], str(row["threads"]), *(_median(figures, name) for name in CONTESTANTS)]
    cells += [ratio(figures, [name]) for name in ("onnxruntime", "openvino")]
    return [*cells, ratio(figures, PEERS)]


def ratio(figures: Mapping[str, Row], peers: Sequence[str]) -> str:
    """How many times the compiled model is faster than the fastest of the peers."""
    best, own = best_peer(figures, peers), best_peer(figures, ["compiled"])
    return "" if best is None or own is None else f"**{best / own:.2f} x**"


def roofline(rows: Sequence[Row], peaks: Mapping[str, Row]) -> str:
    """Work, the time the machine would need at its limits, and what the compiled model and the best peer make of it."""
    header = ["model", "threads", "GFLOP", "of attention", "MB compulsory", "MB moved", "limit, ms", "GFLOP/s"]
    header += ["of GEMM peak", "best peer's", "of copy bandwidth"]
    return table(header, (_roofline_cells(r, peaks[str(r["threads"])]) for r in rows if "work" in r))


def _roofline_cells(row: Row, peak: Row) -> list[str]:
    work = row["work"]
    flops = work["products"] + work["attention"]
    rate, bandwidth = row.get("gemm_gflops", peak["gflops"]) * 1e9, peak["copy_gbs"] * 1e9
    cells = [row["model"], str(row["threads"]), f"{flops / 1e9:.3g}", f"{work['attention'] / max(flops, 1):.0%}"]
    cells += [f"{work[part] / 1e6:.1f}" for part in ("compulsory", "moved")]
    cells.append(f"{1e3 * max(flops / rate, work['compulsory'] / bandwidth):.2f}")
    own, best = (best_peer(row["contestants"], names) for names in (["compiled"], PEERS))
    cells.append("" if own is None else f"{flops / own / 1e6:.1f}")
    cells += ["" if time is None else f"{flops / (time / 1e3) / rate:.0%}" for time in (own, best)]
    cells.append("" if own is None else f"{work['moved'] / (own / 1e3) / bandwidth:.0%}")
    return cells


def peak_memory(rows: Sequence[Row]) -> str:
    """Per contestant: while loading and at the first run / while running."""
    return table(["model", "threads", *CONTESTANTS], (_memory_cells(row) for row in rows))


def _memory_cells(row: Row) -> list[str]:
    figures = row["contestants"]
    cells = [row["model"], str(row["threads"])]
    for name in CONTESTANTS:
        own = figures.get(name, {})
        cells.append(f"{own['load_mb']:.0f} / {own['run_mb']:.0f}" if "run_mb" in own else "")
    return cells


def artifacts(rows: Sequence[Row]) -> str:
    """Per model, once: what `optimize --target cpu --no-verify` took and wrote."""
    by_model = {row["model"]: row["artifact"] for row in rows if "library_mb" in row.get("artifact", {})}
    header = ["model", "seconds", "library, MB", "model file, MB", "library / file"]
    return table(header, (_artifact_cells(name, artifact) for name, artifact in by_model.items()))


def _artifact_cells(name: str, artifact: Row) -> list[str]:
    library, weights = artifact["library_mb"], artifact["weights_mb"]
    return [name, f"{artifact['seconds']:.0f}", f"{library:.1f}", f"{weights:.1f}", f"{library / weights:.2f}"]


def _median(figures: Mapping[str, Row], name: str) -> str:
    own = figures.get(name)
    if own is None:
        return ""
    if "failed" in own:
        return "failed"
    mark = " (differs)" if own.get("difference", 0.0) > SUSPICIOUS else ""
    return f"{own['median_ms']:.{2 if own['median_ms'] < 10 else 1}f}{mark}"


def _footnotes(rows: Sequence[Row]) -> list[str]:
    """Why cells say `failed` or `differs`."""
    notes = []
    for row in rows:
        for name, own in row["contestants"].items():
            where = f"{name} on {row['model']}, {counted(row['threads'])}"
            if "failed" in own:
                notes.append(f"* {where}: failed: {own['failed']}")
            elif own.get("difference", 0.0) > SUSPICIOUS:
                notes.append(f"* {where}: outputs differ by {own['difference']:.1e} of the largest")
    return ["\n".join(notes)] if notes else []


def _heading(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    clock = " Times are CPU seconds of one thread." if machine["clock"] == "cpu" else ""
    return f"{machine['date']}, {machine['description']}. {versions}.{clock}"


def _peaks(peaks: Mapping[str, Row]) -> str:
    return "\n".join(_peak(int(threads), peak) for threads, peak in sorted(peaks.items()))


def _peak(threads: int, peak: Row) -> str:
    rates = ", ".join(f"{engine} {rate:.1f}" for engine, rate in peak["engines"].items())
    return (
        f"* {counted(threads)}: GEMM peak {peak['gflops']:.1f} GFLOP/s ({peak['engine']}, {peak['shape']}; "
        f"best of each: {rates}), copy {peak['copy_gbs']:.1f} GB/s"
    )


def counted(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"
