"""Original against rewritten against compiled, on numbers.

An error is the largest difference of an output as a share of its scale, scale being max |reference output|. The
reference is the original model in ONNX Runtime, itself rounded, so the tolerance has two parts and is the larger of:

* what reordering costs. A float32 sum of K terms taken in another order moves by about sqrt(K) * 2**-24 of the terms'
  size; with K up to some thousands that is 4e-6, and the layers of a deep network, adding as a random walk, stay
  below 1e-5 (`TOLERANCE["rewritten"]`). Compiled kernels also replace exp and erf by polynomials of a few ulp and
  reorder every layer, not only the rewritten ones: 1e-4. Half precision rounds every result to 2**-11; a hundred of
  them as a random walk make 5e-3. On CPUs bfloat16 rounds only operands of products, to 2**-8, and errors of the terms
  of a sum average out: 5e-3 in Swin-T. On GPUs it rounds all that passes between kernels: a hundred times as a random
  walk 4e-2 (`bf16-stored`), in Swin-T 7e-3.
* what the original's own last bits cost: it is run again with every input moved by one ulp, and `AMPLIFICATION` times
  the change that makes is allowed. Rounding errors enter at every layer, not only at the first, and folded branches
  round weights anew; so where that does not suffice, the weights of every product are moved by one ulp as well, which
  takes another session. Never more than `CEILING`: none but that of `bf16-stored` would pass a result that is off by a
  percent.
  Large inputs are made only so large that the first part is still the larger one, where such an amplitude exists.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from attnrewrite.errors import UserError, VerificationError
from attnrewrite.verify.inputs import (
    LARGE,
    InputSpec,
    Interface,
    cases,
    has_symbolic_batch,
    interface,
    make_inputs,
    nudged,
    resolve_shapes,
)
from attnrewrite.verify.runners import OnnxRunner, Runner, RunnerError
from attnrewrite.verify.weights import write_moved_weights

Candidate = Literal["rewritten", "compiled"]
Precision = Literal["fp32", "fp16", "bf16", "bf16-stored"]

TOLERANCE: dict[tuple[Candidate, Precision], float] = {
    ("rewritten", "fp32"): 1e-5,
    ("rewritten", "fp16"): 5e-3,
    ("compiled", "fp32"): 1e-4,
    ("compiled", "fp16"): 8e-3,
    ("compiled", "bf16"): 9e-3,
    ("compiled", "bf16-stored"): 4e-2,
}
CEILING: dict[Precision, float] = {"fp32": 1e-3, "fp16": 9e-3, "bf16": 9.5e-3, "bf16-stored": 4e-2}
_COARSER: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "bf16-stored")
AMPLIFICATION = 8.0
SEED = 20260417


@dataclass(frozen=True)
class Difference:
    """How far `found` is from `expected`. error: share of scale, inf where shapes, NaNs or infinities disagree.

    scale: max |expected| over its finite elements; where that is 0 the error is the absolute one.
    at: index of the worst element, empty for equal arrays. what: one sentence where numbers cannot say it.
    """

    error: float
    scale: float
    at: tuple[int, ...] = ()
    expected: float = 0.0
    found: float = 0.0
    what: str = ""

    def __str__(self) -> str:
        if self.what:
            return self.what
        if self.error == 0:
            return "equal"
        index = ", ".join(map(str, self.at))
        share = f"{self.error:.2e} of scale {self.scale:.4g}"
        return f"element [{index}] is {self.found:.9g}, expected {self.expected:.9g} ({share})"


def compare(expected: np.ndarray, found: np.ndarray) -> Difference:
    """The largest difference of two arrays. NaN equals NaN at the same place, and an infinity one of its sign."""
    if expected.shape != found.shape:
        return Difference(np.inf, 0.0, what=f"the shape is {list(found.shape)}, expected {list(expected.shape)}")
    a, b = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if a.size == 0:
        return Difference(0.0, 0.0)
    finite = np.isfinite(a)
    scale = float(np.max(np.abs(a), initial=0.0, where=finite))
    with np.errstate(invalid="ignore"):
        distance = np.abs(a - b)
    distance = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, distance)
    distance = np.where(np.isnan(distance), np.inf, distance)
    at = np.unravel_index(int(np.argmax(distance)), a.shape)
    worst = float(distance[at])
    return Difference(worst / (scale or 1.0), scale, tuple(map(int, at)), float(a[at]), float(b[at]))


@dataclass(frozen=True)
class Comparison:
    """One output of one candidate on one trial. error, scale: see Difference; tolerance: the largest error allowed."""

    candidate: Candidate
    case: str
    batch: int
    output: str
    error: float
    scale: float
    tolerance: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self) | {"passed": self.passed}
        return fields | {"error": _json_number(self.error)}


@dataclass(frozen=True)
class Verification:
    """What was compared and what could not be. exact: one entry per emitted op, from attnrewrite.verify.exact.

    notes: sentences on what was not tried, and why. failures: sentences on what kept a candidate from being compared.
    """

    comparisons: tuple[Comparison, ...] = ()
    exact: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    seconds: float = 0.0
    precision: Precision = field(default="fp32")

    @property
    def passed(self) -> bool:
        return not self.failures and all(c.passed for c in self.comparisons) and all(e["passed"] for e in self.exact)

    def of(self, candidate: Candidate) -> tuple[Comparison, ...]:
        return tuple(c for c in self.comparisons if c.candidate == candidate)

    def max_error(self, candidate: Candidate) -> float | None:
        """The largest error, as a share of scale; None where the candidate was not compared."""
        return max((c.error for c in self.of(candidate)), default=None)

    def explain_failure(self) -> str:
        """One sentence on the first thing that failed; empty where all passed."""
        if self.failures:
            return self.failures[0]
        for check in self.exact:
            if not check["passed"]:
                return f"{check['node']} is not proved equal to the original: {check['detail']}"
        for c in self.comparisons:
            if not c.passed:
                return (
                    f"the {c.candidate} model differs at output {c.output} (input {c.case}, batch {c.batch}): "
                    f"{c.detail}, allowed {c.tolerance:.1e}"
                )
        return ""

    def to_json(self) -> dict[str, Any]:
        errors: dict[str, Any] = {
            candidate: {
                "max_error": _json_number(error),
                "tolerance": max(c.tolerance for c in self.of(candidate)),
                "passed": all(c.passed for c in self.of(candidate)),
            }
            for candidate in ("rewritten", "compiled")
            if (error := self.max_error(candidate)) is not None
        }
        return {
            "passed": self.passed,
            **errors,
            "exact": list(self.exact),
            "comparisons": [c.to_json() for c in self.comparisons],
            "notes": list(self.notes),
            "failures": list(self.failures),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class _Trial:
    case: str
    batch: int
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    sensitivity: dict[str, float]


def verify_models(
    original: Path | str,
    rewritten: Path | str,
    *,
    trials: int = 3,
    compiled: Callable[[], Runner] | None = None,
    compiled_precision: Precision = "fp32",
    compiled_trials: int | None = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    threads: int | None = None,
    seed: int = SEED,
    tolerance: float | None = None,
) -> Verification:
    """Run the original and its rewritten (and compiled) forms on the same inputs and compare every output.

    original, rewritten: ONNX files. compiled: loads the library made of the rewritten one. trials: how many inputs;
    they go through `CASES` of attnrewrite.verify.inputs and, where the batch is symbolic, through batches 1, 2 and 3.
    compiled_trials: the library gets only so many, the first ones. tolerance: in place of the derived one. One model
    is in memory at a time.
    Raises UserError where the original does not run. A wrong result raises nothing: see `Verification.passed`.
    """
    original, rewritten = Path(original), Path(rewritten)
    model = interface(original)
    shapes = _known_shapes(model, interface(rewritten), input_shapes or {})
    precision: Precision = "fp16" if model.half_precision else "fp32"
    reference, notes = _reference(original, model.inputs, shapes, precision, trials, threads, seed)

    compared: list[tuple[_Trial, Comparison]] = []
    failures: list[str] = []
    loaders: list[tuple[Candidate, Precision, Callable[[], Runner]]] = [
        ("rewritten", precision, lambda: OnnxRunner(rewritten, threads))
    ]
    if compiled is not None:
        stored: Precision = "bf16-stored" if model.bfloat16 else "fp32"
        loaders.append(("compiled", max(precision, compiled_precision, stored, key=_COARSER.index), compiled))
    for candidate, of_precision, load in loaders:
        try:
            runner = load()
            for trial in reference[: compiled_trials if candidate == "compiled" else None]:
                rows = _compare_trial(candidate, of_precision, runner.run(trial.inputs), trial, tolerance)
                compared += [(trial, row) for row in rows]
            del runner
        except RunnerError as error:
            failures.append(f"the {candidate} model does not run: {error}")
        gc.collect()
    if tolerance is None:
        compared = _with_weights_moved(original, compared, CEILING[precision], threads, seed)
    return Verification(tuple(row for _, row in compared), (), tuple(notes), tuple(failures), precision=precision)


def require(verification: Verification) -> None:
    """Raises VerificationError with one sentence on the first failure."""
    if not verification.passed:
        raise VerificationError(verification.explain_failure())


def _known_shapes(
    original: Interface, rewritten: Interface, given: Mapping[str, Sequence[int | str]]
) -> dict[str, Sequence[int | str]]:
    """The shapes asked for, completed by those to which the rewritten model was specialised."""
    known: dict[str, Sequence[int | str]] = {spec.name: spec.shape for spec in rewritten.inputs}
    names = {spec.name for spec in original.inputs}
    return {name: shape for name, shape in {**known, **given}.items() if name in names or name in given}


def _reference(
    original: Path,
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int | str]],
    precision: Precision,
    trials: int,
    threads: int | None,
    seed: int,
) -> tuple[list[_Trial], list[str]]:
    """The original's outputs on every trial, and notes on batches it does not run at though it declares them."""
    notes: list[str] = []
    done: list[_Trial] = []
    rng = np.random.default_rng(seed)
    try:
        runner = OnnxRunner(original, threads)
    except RunnerError as error:
        raise UserError(f"{original} does not load in ONNX Runtime: {error}") from error
    for case, batch in cases(trials, has_symbolic_batch(specs, shapes)):
        resolved = resolve_shapes(specs, shapes, batch)
        try:
            for amplitude in LARGE if case == "large" else (1.0,):
                inputs = make_inputs(specs, resolved, case, rng, amplitude)
                expected = runner.run(inputs)
                moved = runner.run(nudged(inputs, rng))
                sensitivity = {name: compare(expected[name], moved[name]).error for name in expected}
                steady = AMPLIFICATION * max(sensitivity.values(), default=0.0) <= TOLERANCE["rewritten", precision]
                if steady and not any(np.isnan(v).any() for v in expected.values() if v.dtype.kind == "f"):
                    break  # where the original overflows, a smaller amplitude proves more
        except RunnerError as error:
            if batch == 1:
                tried = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in resolved.items())
                raise UserError(f"{original} does not run in ONNX Runtime with {tried}: {error}") from error
            notes.append(f"the original itself does not run at batch {batch}")
            continue
        done.append(_Trial(case, batch, inputs, expected, sensitivity))
    silent = [name for name in runner.outputs if done and not any(np.any(trial.expected[name]) for trial in done)]
    notes += [f"the original's output {name} is zero on every input tried, which proves little" for name in silent]
    return done, notes


def _compare_trial(
    candidate: Candidate, precision: Precision, found: Mapping[str, np.ndarray], trial: _Trial, given: float | None
) -> list[Comparison]:
    rows = []
    for name, expected in trial.expected.items():
        derived = _tolerance(candidate, precision, expected, trial.sensitivity[name])
        tolerance = derived if given is None else given
        if name in found:
            difference = compare(expected, found[name])
        else:
            difference = Difference(np.inf, 0.0, what=f"there is no such output; found {', '.join(found)}")
        rows.append(
            Comparison(
                candidate, trial.case, trial.batch, name, difference.error, difference.scale, tolerance, str(difference)
            )
        )
    return rows


def _with_weights_moved(
    original: Path, compared: list[tuple[_Trial, Comparison]], ceiling: float, threads: int | None, seed: int
) -> list[tuple[_Trial, Comparison]]:
    """The comparisons with what the weights' last bits cost allowed, where one failed that this may explain."""
    if not any(row.tolerance < row.error <= ceiling and row.tolerance > 0 for _, row in compared):
        return compared
    rng = np.random.default_rng(seed)
    changes: dict[int, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        moved = Path(folder) / "model.onnx"
        write_moved_weights(original, moved, rng)
        runner = OnnxRunner(moved, threads)
        for trial in {id(trial): trial for trial, row in compared if row.tolerance < row.error}.values():
            found = runner.run(nudged(trial.inputs, rng))
            changes[id(trial)] = {name: compare(trial.expected[name], found[name]).error for name in trial.expected}
        del runner
    done = []
    for trial, row in compared:
        if id(trial) in changes and row.tolerance > 0:
            allowed = min(AMPLIFICATION * changes[id(trial)][row.output], ceiling)
            row = replace(row, tolerance=max(row.tolerance, allowed))
        done.append((trial, row))
    return done


def _tolerance(candidate: Candidate, precision: Precision, expected: np.ndarray, sensitivity: float) -> float:
    """The largest error allowed; 0 for integers and booleans."""
    if expected.dtype.kind in "iub":
        return 0.0
    allowed = max(TOLERANCE[candidate, precision], AMPLIFICATION * sensitivity)
    return min(allowed, CEILING[precision])


def _json_number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return str(value) if value is not None and not np.isfinite(value) else value
