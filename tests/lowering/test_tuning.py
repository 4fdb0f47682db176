"""Tuning: what is searched in which order, what is remembered, and that a tuned tile changes code but not results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

from attnrewrite.errors import CompilerError
from attnrewrite.lowering import build, importer, tuning
from attnrewrite.lowering import compile as lowering
from attnrewrite.lowering.choices import Choice, Choices, Product
from attnrewrite.lowering.kernels.vector_math import VectorUnit, vector_unit
from attnrewrite.lowering.packing import repacked
from attnrewrite.lowering.remembered import Finding, Machine, Memory
from attnrewrite.lowering.schedules.cpu import schedule_function
from attnrewrite.lowering.schedules.products import choose_tile
from attnrewrite.lowering.search import MARGIN, Search, Subject
from attnrewrite.lowering.targets import parse_target
from tests.lowering.compiling import artifact, model, node, normal, relative_error, small_network

MACHINE = Machine("Some CPU @ 3 GHz", '{"kind":"llvm"}', {"attnrewrite": "1", "apache-tvm": "2"})
SMALL = Product(1, 49, 96, 64, "float32", packed=True)
LARGE = Product(1, 3136, 96, 64, "float32", packed=True)
WIDE = Choice(3, 7)
FAST, SLOW = Choice(6, 4), Choice(1, 1, rows_outside=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNREWRITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# What is remembered


def test_findings_come_back_as_they_were_written(own_cache):
    memory = Memory(MACHINE, threads=2)
    memory.write(SMALL, Finding(SLOW, tried=7, speedup=1.25))
    memory.write(LARGE, Finding(None, tried=15, speedup=1.0))
    again = Memory(MACHINE, threads=2)
    assert again.read() == {SMALL.key: Finding(SLOW, 7, 1.25), LARGE.key: Finding(None, 15, 1.0)}
    assert again.choices().of(SMALL) == SLOW
    assert again.choices().of(LARGE) is None
    assert memory.path.parent == own_cache / "tuned"
    assert [path.name for path in memory.path.parent.iterdir()] == [memory.path.name]


def test_other_machines_and_other_numbers_of_threads_are_kept_apart():
    Memory(MACHINE, 1).write(SMALL, Finding(FAST, 1, 1.1))
    Memory(MACHINE, 2).write(SMALL, Finding(SLOW, 2, 1.2))
    assert Memory(MACHINE, 1).read() == {SMALL.key: Finding(FAST, 1, 1.1)}
    assert Memory(MACHINE, 2).read() == {SMALL.key: Finding(SLOW, 2, 1.2)}
    for other in (
        Machine("Another CPU", MACHINE.target, MACHINE.versions),
        Machine(MACHINE.cpu, '{"kind":"llvm","mcpu":"haswell"}', MACHINE.versions),
        Machine(MACHINE.cpu, MACHINE.target, {**MACHINE.versions, "apache-tvm": "3"}),
    ):
        assert Memory(other, 1).read() == {}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": 0, "findings": {}}', '{"format": 1, "findings": []}'])
def test_damaged_file_counts_as_empty_and_is_written_anew(text):
    memory = Memory(MACHINE, 1)
    memory.path.parent.mkdir(parents=True)
    memory.path.write_text(text)
    assert memory.read() == {}
    memory.write(SMALL, Finding(FAST, 1, 1.1))
    assert memory.read() == {SMALL.key: Finding(FAST, 1, 1.1)}


@pytest.mark.parametrize(
    "choice",
    [
        {"rows": 0, "vectors": 1, "rows_outside": None},
        {"rows": 4, "vectors": True, "rows_outside": None},
        {"rows": 4, "vectors": 1000, "rows_outside": None},
        {"rows": 4, "vectors": 2, "rows_outside": "yes"},
        {"rows": 4},
        [4, 2],
    ],
)
def test_damaged_entry_is_left_out(choice):
    memory = Memory(MACHINE, 1)
    memory.write(SMALL, Finding(FAST, 1, 1.1))
    memory.write(LARGE, Finding(FAST, 1, 1.1))
    document = json.loads(memory.path.read_text())
    document["findings"]["threads=1"][LARGE.key]["choice"] = choice
    memory.path.write_text(json.dumps(document))
    assert memory.read() == {SMALL.key: Finding(FAST, 1, 1.1)}


# What is searched


@dataclass
class Bench:
    """Kernels that take the seconds a table says, on a clock of their own; every measurement costs `cost` seconds."""

    seconds: Callable[[Product, Choice | None], float]
    cost: float = 1.0
    now: float = 0.0
    asked: list[tuple[Product, tuple[Choice | None, ...]]] = field(default_factory=list)

    def __call__(self, product: Product, choices: Sequence[Choice | None]) -> list[float]:
        self.now += self.cost
        self.asked.append((product, tuple(choices)))
        return [self.seconds(product, choice) for choice in choices]

    def search(self, subjects: Sequence[Subject], seconds: float) -> float:
        self.found: list[tuple[Product, Finding]] = []
        search = Search(
            subjects,
            self,
            lambda: self.now,
            lambda subject: self.found.append((subject.product, subject.finding)),
            lambda progress: None,
        )
        return search.run(seconds)


def test_faster_candidate_is_taken_and_slower_ones_are_not():
    times = {None: 1.0, SLOW: 1.5, FAST: 0.8, WIDE: 0.9}
    bench = Bench(lambda product, choice: times[choice])
    subject = Subject(SMALL, calls=2, candidates=[SLOW, FAST, WIDE])
    bench.search([subject], seconds=1000)
    assert subject.finding == Finding(FAST, tried=3, speedup=1.25)
    assert subject.saved == pytest.approx(2 * 0.2)
    assert bench.found[-1] == (SMALL, subject.finding)


def test_gain_within_the_noise_is_not_believed():
    bench = Bench(lambda product, choice: 1.0 if choice is None else 1.0 - 0.9 * MARGIN)
    subject = Subject(SMALL, 1, [FAST])
    bench.search([subject], seconds=1000)
    assert subject.finding == Finding(None, tried=1, speedup=1.0)


def test_gain_that_does_not_repeat_is_not_believed():
    bench = Bench(lambda product, choice: 0.5 if choice is not None and len(bench.asked) == 2 else 1.0)
    subject = Subject(SMALL, 1, [FAST])
    bench.search([subject], seconds=1000)
    assert (SMALL, (FAST, None)) in bench.asked
    assert subject.choice is None


@pytest.mark.parametrize("budget", [0.0, 0.5, 3.0, 10.5, 29.0])
def test_budget_is_exceeded_by_one_measurement_at_most(budget):
    bench = Bench(lambda product, choice: 1.0 if choice is None else 1.0 / (choice.rows + 1), cost=2.5)
    subjects = [Subject(product, 1, [Choice(rows, 1) for rows in range(1, 9)]) for product in (SMALL, LARGE)]
    used = bench.search(subjects, budget)
    assert used == bench.now
    assert used < budget + bench.cost
    assert used >= min(budget, 2.5)


def test_time_goes_where_most_is_lost():
    # Both do the same work per second, but for the large one's second kernel, which is ten times slower.
    def seconds(product: Product, choice: Choice | None) -> float:
        return product.flops / (1e9 if product == LARGE else 1e10)

    bench = Bench(seconds)
    tiles = [Choice(rows, 1) for rows in range(1, 9)]
    bench.search([Subject(SMALL, 1, tiles), Subject(LARGE, 1, tiles)], seconds=9.0)
    tried = [product for product, choices in bench.asked if len(choices) == 2]
    assert tried == [LARGE] * 7


def test_search_goes_on_where_the_last_one_stopped():
    bench = Bench(lambda product, choice: 1.0)
    bench.search([Subject(SMALL, 1, [SLOW, FAST, WIDE], choice=SLOW, speedup=1.2, tried=2)], seconds=1000)
    assert bench.asked == [(SMALL, (None,)), (SMALL, (WIDE, SLOW))]


def test_crash_is_remembered_as_tried():
    def crash(product: Product, choice: Choice | None) -> float:
        if choice == SLOW:
            raise RuntimeError("illegal instruction")
        return 1.0

    bench = Bench(crash)
    with pytest.raises(RuntimeError):
        bench.search([Subject(SMALL, 1, [SLOW, FAST])], seconds=1000)
    assert bench.found == [(SMALL, Finding(None, tried=1, speedup=1.0))]


@pytest.mark.parametrize("unit", [VectorUnit(16, 24), VectorUnit(8, 12), VectorUnit(4, 24)], ids=str)
@pytest.mark.parametrize("product", [SMALL, LARGE, Product(24, 49, 32, 49, "float32", packed=False)], ids=str)
def test_candidates_differ_from_each_other_and_fit_the_registers(product, unit):
    tiles = tuning.candidates(product, unit)
    assert len(set(tiles)) == len(tiles) >= 8
    own = choose_tile(product.rows, product.columns, unit)
    assert Choice(own.rows, own.vectors) not in tiles
    assert all(tile.rows * tile.vectors <= unit.accumulators for tile in tiles)


# What it changes


def linear(width: int = 80):  # type: ignore[no-untyped-def]
    """A linear layer with GELU between two others, whose widths no tile divides."""
    nodes = [
        node("MatMul", "x w0", "m"),
        node("Add", "m b0", "a"),
        node("Sigmoid", "a", "s"),
        node("Mul", "a s", "h"),
        node("MatMul", "h w1", "y"),
    ]
    weights = {"w0": normal(24, width), "b0": normal(width), "w1": normal(width, 20)}
    return model(nodes, {"x": [1, 37, 24]}, weights)


def imported(proto):  # type: ignore[no-untyped-def]
    target = parse_target("cpu")
    description = build.tvm_target(target)
    return importer.import_onnx(proto, target, description), description


def kernel_of(mod, description, product: Product, tuned: Choices | None = None):  # type: ignore[no-untyped-def]
    return next(k for k in tuning.kernels_of(build.fuse(mod, description, tuned)) if k.product == product)


FIRST = Product(1, 37, 80, 24, "float32", packed=True)


def test_every_product_of_a_model_is_found_once_with_its_calls():
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a w", "b"), node("Relu", "b", "c"), node("MatMul", "c v", "y")]
    proto = model(nodes, {"x": [1, 37, 24]}, {"w": normal(24, 24), "v": normal(24, 20)})
    kernels = tuning.kernels_of(build.fuse(*imported(proto)))
    square, last = (Product(1, 37, n, 24, "float32", packed=True) for n in (24, 20))
    assert {kernel.product: kernel.calls for kernel in kernels} == {square: 2, last: 1}
    assert all(kernel.constant == (False, True, False) for kernel in kernels)


def test_products_of_unknown_size_are_left_to_the_cost_model():
    proto = model([node("MatMul", "x w", "y")], {"x": ["batch", 37, 24]}, {"w": normal(24, 80)})
    assert tuning.kernels_of(build.fuse(*imported(proto))) == []


@pytest.mark.parametrize("tile", [Choice(5, 1), Choice(2, 3, rows_outside=False), Choice(1, 2, rows_outside=True)])
def test_tuned_tile_changes_the_panel_and_the_result_stays_right(tile):
    proto = linear()
    mod, description = imported(proto)
    lanes = vector_unit(description).lanes
    choices = Choices({FIRST.key: tile})
    kernel = kernel_of(mod, description, FIRST, choices)
    panel = next(p for p, constant in zip(kernel.func.params, kernel.constant, strict=True) if constant)
    assert [int(extent) for extent in panel.shape] == [-(-80 // (tile.vectors * lanes)), 24, tile.vectors * lanes]

    choices.applied.clear()
    executable = build.build(mod, description, choices).executable
    assert choices.applied == {FIRST.key}
    x = normal(1, 37, 24)
    w0, b0, w1 = normal(24, 80).astype(np.float64), normal(80), normal(80, 20).astype(np.float64)
    hidden = x.astype(np.float64) @ w0 + b0
    expected = hidden / (1.0 + np.exp(-hidden)) @ w1
    found = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x))
    found = (found if hasattr(found, "numpy") else found[0]).numpy()
    assert relative_error(found, expected) < 1e-6


def test_repacked_kernel_is_the_one_that_compiling_with_that_tile_makes():
    mod, description = imported(linear())
    unit, tile = vector_unit(description), Choice(3, 2)
    choices = Choices({FIRST.key: tile})
    before, after = kernel_of(mod, description, FIRST), kernel_of(mod, description, FIRST, choices)
    made = schedule_function(repacked(before.func, FIRST.columns, tile.vectors * unit.lanes), unit, choices)
    expected = schedule_function(after.func, unit, choices)
    assert tvm_ffi.structural_equal(made, expected, map_free_vars=True)
    assert not tvm_ffi.structural_equal(schedule_function(before.func, unit), expected, map_free_vars=True)


def test_tuning_times_real_kernels():
    mod, description = imported(linear())
    found: list[Subject] = []
    ticks = itertools.count()
    tuned = tuning.tune(mod, description, 20, {}, found.append, lambda progress: None, lambda: float(next(ticks)))
    assert tuned.tried == sum(s.tried for s in tuned.subjects) > 0
    assert {s.product for s in found} <= {s.product for s in tuned.subjects}
    assert all(s.seconds > 0 for s in tuned.subjects)
    assert {s.product for s in tuned.subjects} == {FIRST, Product(1, 37, 20, 80, "float32", packed=True)}


# The whole way


def test_artifact_is_tuned_and_says_so(tmp_path):
    progress = []
    report = artifact(linear(), tmp_path / "tuned", "cpu", threads=1, tune=1.0, on_tuning=progress.append)
    assert progress[-1].products == 2
    assert progress[-1].budget == 1.0
    assert report.tuning is not None
    assert report.tuning["products"] == 2
    assert report.tuning["tried"] >= progress[-1].tried
    machine = Machine(tuning.cpu_model(), str(imported(linear())[1]), lowering.versions())
    assert report.tuning["remembered"] == str(Memory(machine, 1).path)
    assert sum(finding.tried for finding in Memory(machine, 1).read().values()) == report.tuning["tried"]


def test_later_runs_use_what_was_found_unless_told_not_to():
    mod, description = imported(linear())
    memory = Memory(Machine(tuning.cpu_model(), str(description), lowering.versions()), threads=1)
    memory.write(FIRST, Finding(Choice(5, 1), tried=3, speedup=1.1))
    memory.write(LARGE, Finding(Choice(5, 1), tried=3, speedup=1.1))  # of another model

    def report(seconds: float | None) -> object:
        tiles = tuning.find_tiles(mod, description, seconds, 1, lowering.versions(), lambda progress: None)
        build.fuse(mod, description, tiles.choices)
        return tiles.to_json()

    assert report(None) == {"remembered": str(memory.path), "applied": [FIRST.key]}
    assert report(0.0) is None


def test_crash_while_tuning_still_gives_a_library(tmp_path, monkeypatch):
    requests = []

    def child(work: Path, *arguments: object) -> None:
        requests.append(json.loads((work / lowering.REQUEST_NAME).read_text())["tune"])
        if requests[-1] is not None:
            raise lowering.CompilerCrash("the compiler crashed (SIGILL)")
        (work / "model.so").write_bytes(b"")
        counts = dict.fromkeys(("kernels", "attention_kernels", "library_bytes", "peak_memory_bytes"), 1)
        weights = {"weights": [], "weights_file": None, "weights_bytes": 0, "beside": []}
        made = {"entry": "main", "inputs": [], "outputs": [], "seconds": {}, "tuning": None, **weights, **counts}
        (work / lowering.RESULT_NAME).write_text(json.dumps(made))

    monkeypatch.setattr(lowering, "run_child", child)
    report = artifact(small_network(), tmp_path / "out", "cpu", tune=5.0)
    assert requests == [5.0, None]
    assert report.tuning == {"notes": ["tuning ended early: the compiler crashed (SIGILL)"]}


def test_crash_without_tuning_is_an_error(tmp_path, monkeypatch):
    def child(*arguments: object) -> None:
        raise lowering.CompilerCrash("the compiler crashed (SIGSEGV)")

    monkeypatch.setattr(lowering, "run_child", child)
    with pytest.raises(CompilerError, match="SIGSEGV"):
        artifact(small_network(), tmp_path / "out", "cpu")


def test_unwritable_cache_is_a_note(own_cache, monkeypatch):
    own_cache.write_text("a file where a directory should be")

    def tune(mod, target, seconds, known, found, progress):  # type: ignore[no-untyped-def]
        subject = Subject(FIRST, 1, [FAST], choice=FAST, speedup=1.5, tried=1)
        found(subject)
        found(subject)
        return tuning.Tuned((subject,), 1, seconds)

    monkeypatch.setattr(tuning, "tune", tune)
    tiles = tuning.find_tiles(*imported(linear()), 1.0, 1, lowering.versions(), lambda progress: None)
    assert tiles.choices.of(FIRST) == FAST
    assert len(tiles.notes) == 1
    assert "could not be kept for later runs" in tiles.notes[0]


def test_failure_while_tuning_is_a_note_and_keeps_what_was_found(monkeypatch):
    def tune(mod, target, seconds, known, found, progress):  # type: ignore[no-untyped-def]
        found(Subject(FIRST, 1, [FAST], choice=FAST, speedup=1.5, tried=1))
        raise RuntimeError("Traceback of a compiler\n  InternalError: no such instruction")

    monkeypatch.setattr(tuning, "tune", tune)
    tiles = tuning.find_tiles(*imported(linear()), 1.0, 1, lowering.versions(), lambda progress: None)
    assert tiles.notes == ("tuning ended early: InternalError: no such instruction",)
    assert tiles.choices.of(FIRST) == FAST
    assert Memory(tiles.memory.machine, 1).read() == {FIRST.key: Finding(FAST, 1, 1.5)}
