"""The table of docs/coverage.md: `python -m tests.zoo [NAMES]`; `make coverage`.

Each export runs in a child process of its own, under a time and a memory limit. Results are kept (build/zoo), so that a
run that was interrupted goes on where it stopped, and only what changed is measured again.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.zoo.coverage import Row, page
from tests.zoo.measure import ROOT, SECONDS, Result, fingerprint, measured
from tests.zoo.model import Model
from tests.zoo.models import MODELS, PENDING

PAGE = ROOT / "docs" / "coverage.md"


def known_result(model: Model, exporter: str, folder: Path) -> Result | None:
    """The last result for a model, if it is one of the present state of the sources."""
    result = Result.read(folder / model.name / exporter / "result.json")
    return result if result is not None and result.fingerprint == fingerprint(model, exporter) else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models, or parts of their names; the page is written for all of them")
    parser.add_argument("--exporters", default="torchscript,dynamo", help="those to run, separated by commas")
    parser.add_argument("--known", action="store_true", help="write the page from the results there are")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="child processes at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of one export")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "zoo", help="where exports and results are kept"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write")
    arguments = parser.parse_args()
    chosen = [m for m in MODELS.values() if not arguments.names or any(n in m.name for n in arguments.names)]
    exporters = arguments.exporters.split(",")
    tasks = [(m, e) for m in chosen if m.installed for e in m.exporters if e in exporters and not arguments.known]
    start = time.perf_counter()
    done: dict[tuple[str, str], Result] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures: dict[Future[Result], tuple[str, str]] = {}
        for model, exporter in tasks:
            folder = arguments.folder / model.name / exporter
            future = pool.submit(measured, model, exporter, folder, fresh=arguments.fresh, seconds=arguments.seconds)
            futures[future] = (model.name, exporter)
        for future in as_completed(futures):
            key = futures[future]
            done[key] = result = future.result()
            said = result.failed or ", ".join(MODELS[key[0]].complaints(result.found)) or "as expected"
            clock = time.perf_counter() - start
            print(f"[{len(done)}/{len(tasks)} {clock:.0f} s] {key[0]} {key[1]}: {said}"[:300], flush=True)
    rows = [
        Row(m, e, done.get((m.name, e)) or known_result(m, e, arguments.folder)) for m in chosen for e in m.exporters
    ]
    arguments.output.write_text(page(rows, PENDING))
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
