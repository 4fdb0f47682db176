"""What is asked of one random case: recognised where it should be, and right wherever anything was rewritten."""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from attnrewrite.pipeline import Outcome
from tests.passes.rewritten import optimize, written
from tests.property.draw import Drawn, draw
from tests.property.faults import with_fault
from tests.running import run

# Reductions are of some tens of terms of order 1 to 10: float32 leaves about 1e-6 of the largest output, float16 3e-3.
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 1e-2}


@dataclass(frozen=True)
class Result:
    """One case. rewritten: every site was; reasons: of the sites left; wrong: how the rewritten model differs, or the
    exception in which rewriting it or running it ended.
    """

    drawn: Drawn
    fault: str | None
    rewritten: bool
    reasons: tuple[str, ...]
    wrong: str | None


def check_spelling(seed: int) -> Result:
    """Rewrite the spelling of a seed and compare."""
    drawn = draw(seed)
    return _check(drawn, drawn.model, None)


def check_near_miss(seed: int) -> Result | None:
    """Rewrite the spelling of a seed with one fault and compare; None where no fault has a place in it."""
    drawn = draw(seed, detours=2)
    faulty = with_fault(drawn.model, random.Random(seed * 7 + 1))
    return None if faulty is None else _check(drawn, *faulty)


def _check(drawn: Drawn, model: onnx.ModelProto, fault: str | None) -> Result:
    try:
        outcome = optimize(model)
    except Exception as error:  # whatever it is, it is one case that fails, not the end of the run
        return Result(drawn, fault, False, (), _in_one_line(error))
    left = [s for s in outcome.sites if s.verdict == "leave"]
    reasons = tuple(f"{s.reason} ({s.reason_node})" for s in left)
    if any(not s.reason or not s.reason_node for s in left):
        return Result(drawn, fault, False, reasons, "a site was left without a reason and a node")
    found = len(outcome.sites) > len(left)
    wrong = _difference(drawn, model, outcome) if found else None
    return Result(drawn, fault, found and not left, reasons, wrong)


def _in_one_line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {message}"


def _difference(drawn: Drawn, model: onnx.ModelProto, outcome: Outcome) -> str | None:
    inputs = drawn.input()
    try:
        expected = run(model, inputs)
    except Exception:  # ONNX Runtime's errors share no class
        return None  # a fault may ask for elements that are not there, which only running tells
    try:
        found = run(written(outcome), inputs)
    except Exception as error:
        return _in_one_line(error)
    for name, array in expected.items():
        tolerance = TOLERANCE[array.dtype]
        largest = np.abs(array[np.isfinite(array)]).max(initial=0.0) or 1.0
        if not np.allclose(found[name], array, rtol=0, atol=tolerance * largest, equal_nan=True):
            off = np.nanmax(np.abs(found[name].astype(np.float64) - array.astype(np.float64)))
            return f"{name} differs by {off / largest:.1e} of its largest element"
    return None
