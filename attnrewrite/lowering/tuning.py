"""Tiles measured on this machine: the matrix products of a model, and kernels of them compiled and timed one by one.

Every candidate goes through the lowering the model itself goes through, with what is fused around the product.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import tvm
from tvm import IRModule, ir, relax, s_tir, tirx
from tvm.relax.analysis import post_order_visit

from attnrewrite.errors import last_line
from attnrewrite.lowering.build import fuse
from attnrewrite.lowering.choices import Choice, Choices, Product
from attnrewrite.lowering.kernels.vector_math import VectorUnit, vector_unit
from attnrewrite.lowering.remembered import Finding, Machine, Memory, choices_of, cpu_model
from attnrewrite.lowering.schedules.cpu import stages_of
from attnrewrite.lowering.schedules.products import choose_tile, match_contraction, narrowed, ranked_tiles
from attnrewrite.lowering.search import Progress, Search, Subject
from attnrewrite.lowering.timing import Kernel, Timer
from attnrewrite.runtime import set_threads

# Of the cost model's ranking, as many tiles are tried.
TILES = 10


@dataclass(frozen=True)
class Tuned:
    """What one run of the tuner did in `seconds`.

    measured: seconds per run of the model in all products that were timed, with the cost model's tiles; saved: of
    these, by tiles that are faster, those known from before included.
    """

    subjects: tuple[Subject, ...]
    tried: int
    seconds: float

    @property
    def measured(self) -> float:
        return sum(s.calls * s.seconds for s in self.subjects)

    @property
    def saved(self) -> float:
        return sum(s.saved for s in self.subjects)

    def to_json(self) -> dict[str, Any]:
        """Times are milliseconds per run of the model; of the products that are faster, the greatest gain first."""
        own = sorted((s for s in self.subjects if s.choice is not None), key=lambda s: -s.saved)
        return {
            "seconds": round(self.seconds, 1),
            "products": len(self.subjects),
            "tried": self.tried,
            "measured_ms": round(self.measured * 1e3, 3),
            "saved_ms": round(self.saved * 1e3, 3),
            "faster": [
                {"product": str(s.product), "calls": s.calls, "speedup": round(s.speedup, 3), **asdict(s.choice)}
                for s in own
                if s.choice is not None
            ],
        }


@dataclass(frozen=True)
class Tiles:
    """What a compilation uses in place of the cost model's tiles, and `to_json`, what the report says of it."""

    choices: Choices
    memory: Memory | None = None
    tuned: Tuned | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any] | None:
        """To be called after the compilation, which shows what was of use; None where nothing was."""
        document: dict[str, Any] = {"remembered": str(self.memory.path)} if self.memory is not None else {}
        if self.tuned is not None:
            document |= self.tuned.to_json()
        elif not self.choices.applied:
            return {"notes": [*self.notes]} if self.notes else None
        return document | {"applied": sorted(self.choices.applied)} | ({"notes": [*self.notes]} if self.notes else {})


def find_tiles(
    mod: IRModule,
    target: tvm.target.Target,
    seconds: float | None,
    threads: int,
    versions: Mapping[str, str],
    progress: Callable[[Progress], Any],
) -> Tiles:
    """Tiles for a module on this machine's CPU: those remembered, after `seconds` of tuning.

    seconds: None: no tuning; 0: nothing remembered is used either. threads: the model will run with.
    """
    if seconds == 0.0:
        return Tiles(Choices())
    memory = Memory(Machine(cpu_model(), str(target), versions), threads)
    if seconds is None:
        return Tiles(memory.choices(), memory)
    known = memory.read()
    notes: list[str] = []

    def found(subject: Subject) -> None:
        known[subject.product.key] = subject.finding
        try:
            memory.write(subject.product, subject.finding)
        except OSError as error:
            if not notes:
                notes.append(f"what tuning found could not be kept for later runs: {error}")

    set_threads(threads)
    tuned = None
    try:
        tuned = tune(mod, target, seconds, known, found, progress)
    except Exception as error:  # TVM raises anything; a kernel of the model itself fails again, and says so, later
        notes.append(f"tuning ended early: {last_line(error)}")
    return Tiles(choices_of(known), memory, tuned, tuple(notes))


def tune(
    mod: IRModule,
    target: tvm.target.Target,
    seconds: float,
    known: Mapping[str, Finding],
    found: Callable[[Subject], Any],
    progress: Callable[[Progress], Any],
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Searches for `seconds` of the clock, starting from what is known by `Product.key`.

    Kernels run with the threads this process has. found, progress: as Search calls them.
    """
    kernels = kernels_of(fuse(mod, target))
    unit = vector_unit(target)
    subjects = []
    for kernel in kernels:
        before = known.get(kernel.product.key, Finding(None, 0, 1.0))
        tiles = candidates(kernel.product, unit)
        subjects.append(Subject(kernel.product, kernel.calls, tiles, before.choice, before.speedup, before.tried))
    search = Search(subjects, Timer(kernels, target), clock, found, progress)
    used = search.run(seconds)
    return Tuned(tuple(search.subjects), search.tried, used)


def kernels_of(mod: IRModule) -> list[Kernel]:
    """One kernel for each product of known size in a fused module, the one called most of those that have it."""
    by_product: dict[Product, list[Kernel]] = {}
    for name, (calls, constant) in _calls(mod).items():
        func = mod[name]
        if not isinstance(func.body, s_tir.SBlockRealize) or not _static(func):
            continue
        read = stages_of(func)
        contractions = [c for c in map(match_contraction, read[0] if read is not None else []) if c is not None]
        product = contractions[0].product if len(contractions) == 1 else None
        if product is not None:
            by_product.setdefault(product, []).append(Kernel(product, func, calls, constant))
    kernels = []
    for product, alike in by_product.items():
        most = max(alike, key=lambda kernel: kernel.calls)
        kernels.append(Kernel(product, most.func, sum(kernel.calls for kernel in alike), most.constant))
    return kernels


def _calls(mod: IRModule) -> dict[Any, tuple[int, tuple[bool, ...]]]:
    """Of every function called: how often, and which of its parameters (results last) are constants."""
    calls: dict[Any, tuple[int, tuple[bool, ...]]] = {}

    def visit(node: Any) -> None:
        if isinstance(node, ir.Call) and node.op == ir.Op.get("relax.call_tir"):
            callee, arguments = node.args[0], [*node.args[1].fields]
            before = calls.get(callee, (0, ()))[0]
            results = len(mod[callee].params) - len(arguments)
            constant = (*(isinstance(a, ir.GenericConst) for a in arguments), *[False] * results)
            calls[callee] = (before + 1, constant)

    for func in mod.functions.values():
        if isinstance(func, relax.Function):
            post_order_visit(func, visit)
    return calls


def _static(func: tirx.PrimFunc) -> bool:
    return all(
        isinstance(param, tirx.Buffer) and all(isinstance(extent, tirx.IntImm) for extent in param.shape)
        for param in func.params
    )


def candidates(product: Product, unit: VectorUnit) -> list[Choice]:
    """What to try in place of the cost model's tile and loop order, the most promising first."""
    unit = unit if product.packed else narrowed(unit, product.columns)
    own = choose_tile(product.rows, product.columns, unit)
    tiles = ranked_tiles(product.rows, product.columns, unit)[:TILES]
    orders = [Choice(t.rows, t.vectors, outside) for t in tiles[:3] for outside in (True, False)]
    return [*orders[:2], *(Choice(t.rows, t.vectors) for t in tiles if t != own), *orders[2:]]
