"""The polynomials against float64, over their whole range and at its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm.script import tirx as T  # noqa: E402
from tvm.target import Target  # noqa: E402

from attnrewrite.lowering.kernels import vector_math  # noqa: E402
from attnrewrite.lowering.kernels.vector_math import VectorUnit, vector_unit  # noqa: E402

LANES = 4


def evaluate(function, x: np.ndarray) -> np.ndarray:
    """function over x, float32 [a multiple of LANES], compiled for the least of this machine's kind."""
    size = x.size

    @T.prim_func
    def apply(source: T.handle, target: T.handle):
        T.func_attr({"global_symbol": "apply"})
        values = T.match_buffer(source, (size,), "float32")
        results = T.match_buffer(target, (size,), "float32")
        for block in range(size // LANES):
            for lane in T.vectorized(LANES):
                results[block * LANES + lane] = function(values[block * LANES + lane])

    output = tvm.runtime.tensor(np.zeros_like(x))
    tvm.compile(tvm.IRModule({"apply": apply}), Target({"kind": "llvm"}))["apply"](tvm.runtime.tensor(x), output)
    return output.numpy()


# Name, low, high, exact function, relative bound. The bounds are those of the docstrings.
RELATIVE = {
    "exp2_of_nonpositive": (-126.0, 0.0, np.exp2, 2e-7),
    "exp2": (-126.0, 127.99, np.exp2, 2e-7),
    "exp": (-87.3, 88.7, np.exp, 3e-7),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_exponentials_keep_their_relative_bound(name):
    low, high, exact, bound = RELATIVE[name]
    x = np.linspace(low, high, 1 << 18, dtype=np.float32)
    wanted = exact(x.astype(np.float64))
    assert np.max(np.abs(evaluate(getattr(vector_math, name), x) / wanted - 1)) <= bound


def test_erf_keeps_its_absolute_bound():
    x = np.linspace(-6, 6, 1 << 16, dtype=np.float32)
    wanted = np.array([math.erf(float(v)) for v in x])
    assert np.max(np.abs(evaluate(vector_math.erf, x) - wanted)) <= 2.5e-7


INFINITE = [-np.inf, -1e4, 1e4, np.inf]
ENDS = {
    "exp2_of_nonpositive": ([-np.inf, -1e4, -127.0, 0.0], [0, 0, 0, 1]),
    "exp2": (INFINITE, [0, 0, np.inf, np.inf]),
    "exp": (INFINITE, [0, 0, np.inf, np.inf]),
    "erf": ([*INFINITE, 0.0, -0.0, 5.0, -5.0], [-1, -1, 1, 1, 0, 0, 1, -1]),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends_of_the_range_are_exact(name):
    x, wanted = ENDS[name]
    assert np.array_equal(evaluate(getattr(vector_math, name), np.array(x, np.float32)), wanted)


@pytest.mark.parametrize("name", ENDS)
def test_nan_stays_nan(name):
    assert np.isnan(evaluate(getattr(vector_math, name), np.full(LANES, np.nan, np.float32))).all()


UNITS = {
    "skylake-avx512": ("x86_64-linux-gnu", VectorUnit(lanes=16, accumulators=24)),
    "haswell": ("x86_64-linux-gnu", VectorUnit(lanes=8, accumulators=12)),
    "x86-64": ("x86_64-linux-gnu", VectorUnit(lanes=4, accumulators=12)),
    "cortex-a76": ("aarch64-linux-gnu", VectorUnit(lanes=4, accumulators=24)),
    "apple-m1": ("arm64-apple-macos", VectorUnit(lanes=4, accumulators=24)),
}


@pytest.mark.parametrize("mcpu", UNITS)
def test_vector_unit_of_a_target(mcpu):
    triple, unit = UNITS[mcpu]
    assert vector_unit(Target({"kind": "llvm", "mtriple": triple, "mcpu": mcpu})) == unit
