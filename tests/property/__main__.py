"""The whole run: `python -m tests.property [SPELLINGS [NEAR_MISSES]]` (5,000 and 10,000 unless told); `make property`.

Prints how often every part was drawn, what share was recognised, and every case that was missed, wrong or ended in an
exception (which counts as wrong). With `spelling SEED` or `near-miss SEED` it shows one case.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor

from tests.property.check import Result, check_near_miss, check_spelling

Verdict = tuple[int, tuple[str, ...], str | None, bool, tuple[str, ...], str | None]


def spelling(seed: int) -> Verdict | None:
    return _plain(check_spelling(seed))


def near_miss(seed: int) -> Verdict | None:
    result = check_near_miss(seed)
    return None if result is None else _plain(result)


def _plain(r: Result) -> Verdict:
    return r.drawn.seed, r.drawn.parts, r.fault, r.rewritten, r.reasons, r.wrong


def run(check: Callable[[int], Verdict | None], count: int) -> list[Verdict]:
    with ProcessPoolExecutor(2) as pool:
        return [r for r in pool.map(check, range(10_000, 10_000 + count), chunksize=20) if r is not None]


def report(title: str, verdicts: list[Verdict], seconds: float) -> int:
    """Print one part of the run; the number of wrong rewrites."""
    rewritten = sum(v[3] for v in verdicts)
    wrong = [v for v in verdicts if v[5]]
    print(f"\n## {title}: {len(verdicts)} cases, {rewritten} rewritten ({rewritten / len(verdicts):.2%}), ", end="")
    print(f"{len(wrong)} wrong, {seconds:.0f} s")
    for seed, _, fault, _, _, what in wrong:
        print(f"WRONG seed {seed} {fault or ''}: {what}")
    return len(wrong)


def counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(names).items()))


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("spelling", "near-miss"):
        for seed in map(int, arguments[1:]):
            print(spelling(seed) if arguments[0] == "spelling" else near_miss(seed))
        return 0
    spellings, near_misses = (int(a) for a in [*arguments, "5000", "10000"][:2])
    start = time.perf_counter()
    found = run(spelling, spellings)
    failed = report("Random spellings", found, time.perf_counter() - start)
    print("drawn:", counted(part for v in found for part in v[1]))
    for seed, _, _, rewritten, reasons, _ in found:
        if not rewritten:
            print(f"missed seed {seed}: {'; '.join(reasons)}")
    start = time.perf_counter()
    faulty = run(near_miss, near_misses)
    failed += report("Random near misses", faulty, time.perf_counter() - start)
    print("drawn:", counted(f"{v[2]}/{'rewritten' if v[3] else 'left'}" for v in faulty))
    recognised = sum(v[3] for v in found) / len(found)
    return 1 if failed or recognised < 0.99 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
