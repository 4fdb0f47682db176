"""The ops and whole models on a CUDA device, against what PyTorch has: one command.

    python benchmarks/gpu.py                     # everything, where torch, nvcc and this package are installed
    python benchmarks/gpu.py --only op,map --rows "head_dim 32" --json found.json   # rows add up in the file
    python benchmarks/gpu.py --print found.json              # its tables
    python benchmarks/gpu.py --dry-run                       # no GPU: small rows, all code but the launches, no figures

Where the GPU's machine has no compiler, compile elsewhere and carry a folder of some 20 MB:

    python benchmarks/gpu.py --build out --arch sm_90 --carry 3.12    # 3.12: the Python of the other machine
    PYTHONPATH=out/site python benchmarks/gpu.py --artifacts out      # there

Levels: `op` (windows alone), `map` (with roll, partition and merge), `neighbourhood`, `model`. Medians of CUDA events,
L2 written over before each call. Results are compared with float64 (models: float32), in memory that held NaN before.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] != str(ROOT):
    # This directory is on the path as the script's own, and its modules are not to be found twice.
    sys.path[0] = str(ROOT)

from benchmarks.tables import table  # noqa: E402

LEVELS = ("op", "map", "neighbourhood", "model")
# Models that `--build` compiles whole; the others take part in PyTorch alone.
BUILT = ("swin_tiny, batch 1", "swin_tiny, batch 32", "slide_swin_tiny, batch 32", "unfold_k3_8, batch 1")
CACHE, MODELS, SITE = "cache", "models", "site"
# What of TVM is Python of its compiler's only, or of no use without the sources.
NOT_CARRIED = ("3rdparty", "include", "src", "cmake", "licenses", "web", "libtvm_compiler.so", "__pycache__")

Document = dict[str, Any]


def chosen(arguments: argparse.Namespace) -> list[Any]:
    """Sites of the levels asked for whose names hold the words asked for."""
    from benchmarks.gpu_rows import sites_of

    levels = arguments.only.split(",")
    if unknown := [level for level in levels if level not in LEVELS]:
        raise SystemExit(f"there is no level {unknown[0]!r}; there are {', '.join(LEVELS)}")
    sites = [site for level in levels for site in sites_of(level, arguments.dry_run)]
    return [site for site in sites if all(word in f"{label(site)}, {site.dtype}" for word in arguments.rows)]


def label(site: Any) -> str:
    return str(site.label if site.level == "model" else site.name)


# -- compiling, anywhere ----------------------------------------------------------------------------------------------


def build(sites: Sequence[Any], folder: Path, architecture: str) -> list[str]:
    """Kernels and models in the folder. Returns what could not be compiled, and why."""
    from attnrewrite.operators.compiled import compile_for

    os.environ["ATTNREWRITE_CACHE"] = str(folder / CACHE)
    alone = [site for site in sites if site.level != "model"]
    print(f"compiling the kernels of {len(alone)} rows", file=sys.stderr)
    failed = list(compile_for(architecture, [(site.spec, site.sample()) for site in alone]))
    for site in sites:
        if site.level == "model":
            print(f"compiling {label(site)}, {site.dtype}", file=sys.stderr)
            failed += build_model(site, folder, architecture)
    return failed


def build_model(site: Any, folder: Path, architecture: str) -> list[str]:
    """The kernels that the model's ops have in PyTorch, and for some models the whole of it."""
    import torch

    import attnrewrite
    from attnrewrite.errors import AttnRewriteError
    from attnrewrite.modules import sites_of
    from attnrewrite.operators.compiled import compile_for
    from benchmarks.gpu_rows import DTYPES, Missing

    try:
        module = site.module()
        with torch.no_grad():
            images = torch.zeros(1, *site.shape()[1:], dtype=DTYPES[site.dtype])
            rewritten = attnrewrite.optimize(module.to(DTYPES[site.dtype]), (images,), verify=False).module
            failed = list(compile_for(architecture, sites_of(rewritten)))
            if label(site) in BUILT:
                host = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
                given = torch.zeros(site.shape())
                done = attnrewrite.optimize(
                    site.module(),
                    (given,),
                    f"cuda:{architecture}",
                    precision=site.dtype,
                    tvm_target=json.dumps({"host": host}),
                    verify=False,
                )
                keep(done, folder / MODELS / site.folder)
    except (Missing, AttnRewriteError) as error:
        return [f"{label(site)}: {error}"]
    return failed


def keep(done: Any, target: Path) -> None:
    """What a compiled model needs to run; its weights, which lie in the library or beside it, compress well."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        done.save(Path(scratch, "out"))
        for file in (Path(scratch, "out", name) for name in ("manifest.json", "model.so", "weights.bin")):
            if file.exists():
                (target / f"{file.name}.xz").write_bytes(lzma.compress(file.read_bytes(), preset=1))


def unpack(folder: Path) -> None:
    """The files of compiled models, as they were."""
    for packed in folder.glob(f"{MODELS}/*/*.xz"):
        file = packed.with_suffix("")
        if not file.exists():
            file.write_bytes(lzma.decompress(packed.read_bytes()))


def carry(folder: Path, python: str) -> None:
    """TVM's runtime and its Python, for another machine's version of that, into `folder`/site: no compiler."""
    import importlib.metadata

    import tvm

    site = folder / SITE
    shutil.copytree(
        Path(tvm.__file__).parent, site / "tvm", ignore=shutil.ignore_patterns(*NOT_CARRIED), dirs_exist_ok=True
    )
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in ("apache-tvm-ffi",)]
    with tempfile.TemporaryDirectory() as scratch:
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 28)]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
        subprocess.run([*command, f"--python-version={python}", "-d", scratch, *wanted], check=True)
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    for part in NOT_CARRIED:
        shutil.rmtree(site / "tvm_ffi" / part, ignore_errors=True)


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(site: Any, clock: Any, artifacts: Path | None) -> dict[str, Any]:
    """The row as JSON: for each contestant its figures and its error, or why there are none."""
    import torch

    from benchmarks.gpu_rows import row_of

    row = row_of(site, clock.device, artifacts)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        exact = row.exact()
        for name, make in row.contestants.items():
            results[name] = figures(name, row, make, exact, clock)
            torch.compiler.reset()
            if not clock.is_dry:
                torch.cuda.empty_cache()
    own = {"level": row.level, "name": row.name, "dtype": row.dtype, "moved": row.moved, "flops": row.flops}
    return {**own, "results": results}


def figures(name: str, row: Any, make: Any, exact: Any, clock: Any) -> dict[str, Any]:
    """Of one contestant."""
    from attnrewrite.operators.compiled import launched_kernels
    from benchmarks.gpu_rows import MODEL_TOLERANCES, NOT_COMPARED, OWN, TOLERANCES, Missing

    before = launched_kernels()
    try:
        run = make()
        run()
        clock.poison(run())
        result = run()[: len(exact)]
        error = float((result.to(exact.dtype) - exact).abs().max() / exact.abs().max())
        tolerance = (MODEL_TOLERANCES if row.level == "model" else TOLERANCES)[row.dtype]
        if name not in NOT_COMPARED and not error <= tolerance:
            return {"failed": f"off by {error:.1e} of the largest result", "error": error}
        if name == OWN and not clock.is_dry and launched_kernels() == before:
            return {"failed": "no kernel was launched; torch computed"}
        measured = clock.measure(run)
    except Missing as missing:
        return {"failed": str(missing)}
    except Exception as problem:  # whatever a peer raises for a shape, or for want of memory
        return {"failed": f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"}
    taken = {} if measured is None else vars(measured)
    return {"error": error, **taken}


def add(document: Document, row: Mapping[str, Any]) -> None:
    """Put a row in place of an earlier one of its name."""
    key = ("level", "name", "dtype")
    same = [i for i, other in enumerate(document["rows"]) if all(other[k] == row[k] for k in key)]
    if same:
        document["rows"][same[0]] = dict(row)
    else:
        document["rows"].append(dict(row))


# -- tables -----------------------------------------------------------------------------------------------------------


def markdown(document: Document) -> str:
    """A table for each level that has rows: milliseconds, share of the copy bandwidth, gains, memory."""
    bandwidth = document.get("copy_bandwidth")
    machine = document["machine"]
    copied = f", copies {bandwidth / 1e9:.0f} GB/s" if bandwidth else ""
    parts = [f"{machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}{copied}"]
    for level in LEVELS:
        rows = [row for row in document["rows"] if row["level"] == level]
        if rows:
            names = list(dict.fromkeys(name for row in rows for name in row["results"]))
            header = ["", "dtype", *(f"{name}, ms" for name in names), "of copy bandwidth", "gain over each", "MB"]
            parts += [f"### {level}", table(header, (cells(row, names, bandwidth) for row in rows)), *notes(rows)]
    return "\n\n".join(parts) + "\n"


def cells(row: Mapping[str, Any], names: Sequence[str], bandwidth: float | None) -> list[str]:
    results = row["results"]
    times = {name: results.get(name, {}).get("median_ms") for name in names}
    own = best_own(times)
    share = row["moved"] / (own / 1e3) / bandwidth if own and bandwidth and row["moved"] else None
    gains = [f"{times[n] / own:.2f}" for n in names if own and times[n] and not is_own(n)]
    memory = [results[n]["peak_mb"] for n in names if is_own(n) and "peak_mb" in results.get(n, {})]
    return [
        row["name"],
        row["dtype"],
        *("" if times[n] is None else f"{times[n]:.3f}" for n in names),
        "" if share is None else f"{share:.0%}",
        ", ".join(gains),
        f"{min(memory):.0f}" if memory else "",
    ]


def is_own(name: str) -> bool:
    return name.startswith("attnrewrite")


def best_own(times: Mapping[str, float | None]) -> float | None:
    return min((ms for name, ms in times.items() if is_own(name) and ms is not None), default=None)


def notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why figures are missing, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, result in row["results"].items():
            if "failed" in result:
                reasons.setdefault((name, result["failed"]), []).append(f"{row['name']}, {row['dtype']}")
    listed = [f"* {n}: {why} ({where[0]}, {len(where)} rows)" for (n, why), where in reasons.items()]
    return ["\n".join(listed)] if listed else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(LEVELS), help="levels, separated by commas")
    parser.add_argument("--rows", nargs="*", default=[], help="words that the names of rows hold")
    parser.add_argument("--json", type=Path, help="file to which rows are added")
    parser.add_argument("--print", type=Path, dest="printed", help="only the tables of such a file")
    parser.add_argument("--build", type=Path, metavar="OUT", help="compile into this folder, and measure nothing")
    parser.add_argument("--arch", default="sm_90", help="for --build: the GPU's architecture")
    parser.add_argument("--carry", metavar="PYTHON", help="with --build: add TVM's runtime for this version of Python")
    parser.add_argument("--artifacts", type=Path, metavar="OUT", help="what --build made")
    parser.add_argument("--dry-run", action="store_true", help="small rows, on the CPU, without figures")
    options = parser.parse_args(arguments)
    if options.printed is not None:
        print(markdown(json.loads(options.printed.read_text(encoding="utf-8"))))
        return
    if options.artifacts is not None:
        # Before anything asks for them: kernels compiled elsewhere, and a TVM without its compiler.
        os.environ["ATTNREWRITE_CACHE"] = str((options.artifacts / CACHE).resolve())
        unpack(options.artifacts)
    sites = chosen(options)
    if options.build is not None:
        failed = build(sites, options.build, options.arch)
        if options.carry is not None:
            carry(options.build, options.carry)
        print("\n".join(failed) if failed else f"everything is in {options.build}")
        return
    print(markdown(run(sites, options)))


def run(sites: Sequence[Any], options: argparse.Namespace) -> Document:
    """Measure the sites; the file, if any, is written after each."""
    import torch

    from benchmarks.gpu_clock import Clock

    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --dry-run does without, --build compiles for one")
    clock = Clock(options.dry_run)
    document: Document = {"machine": clock.describe(), "rows": []}
    if options.json is not None and options.json.exists():
        document["rows"] = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
    document["copy_bandwidth"] = clock.copy_bandwidth()
    artifacts = None if options.artifacts is None else options.artifacts / MODELS
    for site in sites:
        add(document, measure(site, clock, artifacts))
        print(f"{site.level}: {label(site)}, {site.dtype}", file=sys.stderr)
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


if __name__ == "__main__":
    main()
