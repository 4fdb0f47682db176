"""Random chains of movement operators: the composed map is what ONNX Runtime moves, element for element.

A failure prints the chain as code to paste.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.indexing.oracle import Chain

LARGEST = 4096  # elements
Draw = st.DrawFn
PRIMES = (2, 3, 5, 7)


def axis_of(draw: Draw, chain: Chain, least: int = 1) -> int:
    axes = [a for a, e in enumerate(chain.shape) if e >= least]
    assume(axes)
    return draw(st.sampled_from(axes))


def reshape(draw: Draw, chain: Chain) -> None:
    factors = [p for extent in chain.shape for p in _prime_factors(extent)]
    cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4)))
    pieces = [factors[a:b] for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
    chain.op("Reshape", np.array([math.prod(p) for p in pieces], np.int64))


def _prime_factors(number: int) -> list[int]:
    for p in range(2, number + 1):
        if number % p == 0:
            return [p, *_prime_factors(number // p)]
    return []


def transpose(draw: Draw, chain: Chain) -> None:
    chain.op("Transpose", perm=draw(st.permutations(range(len(chain.shape)))))


def slice_(draw: Draw, chain: Chain) -> None:
    axis = axis_of(draw, chain)
    extent = chain.shape[axis]
    picked = range(extent)[draw(st.slices(extent))]
    assume(len(picked) and picked.step)
    end = picked.stop if picked.stop >= 0 else -(2**31)
    chain.op("Slice", *(np.array([v]) for v in (picked.start, end, axis, picked.step)))


def roll(draw: Draw, chain: Chain) -> None:
    axis = axis_of(draw, chain, 2)
    shift = draw(st.integers(1, chain.shape[axis] - 1))
    whole = chain.value
    tail = chain.op("Slice", *(np.array([v]) for v in (shift, chain.shape[axis], axis)))
    chain.value = whole
    head = chain.op("Slice", *(np.array([v]) for v in (0, shift, axis)))
    chain.node("Concat", [tail, head], axis=axis)
    chain.lines[-2:] = [f"roll_by(chain, {shift}, axis={axis})"]


def roll_by(chain: Chain, shift: int, axis: int) -> None:
    """What a printed chain calls."""
    whole = chain.value
    tail = chain.op("Slice", *(np.array([v]) for v in (shift, chain.shape[axis], axis)))
    chain.value = whole
    head = chain.op("Slice", *(np.array([v]) for v in (0, shift, axis)))
    chain.node("Concat", [tail, head], axis=axis)


def split(draw: Draw, chain: Chain) -> None:
    axis = axis_of(draw, chain, 2)
    cut = draw(st.integers(1, chain.shape[axis] - 1))
    sizes = np.array([cut, chain.shape[axis] - cut])
    chain.op("Split", sizes, outputs=2, pick=draw(st.integers(0, 1)), axis=axis)


def concat(draw: Draw, chain: Chain) -> None:
    axis = axis_of(draw, chain)
    beside = np.full([draw(st.integers(1, 2)) if a == axis else e for a, e in enumerate(chain.shape)], -9)
    chain.op("Concat", *draw(st.permutations(["value", draw(st.sampled_from(["value", beside]))])), axis=axis)


def pad(draw: Draw, chain: Chain) -> None:
    pads = [draw(st.integers(-min(1, e - 1), 2)) for e in (*chain.shape, *chain.shape)]
    assume(all(e + a + b > 0 for e, a, b in zip(chain.shape, pads, pads[len(chain.shape) :], strict=False)))
    chain.op("Pad", np.array(pads), np.array(draw(st.integers(-8, 0))))


def pad_by_mode(draw: Draw, chain: Chain) -> None:
    axis = axis_of(draw, chain, 3)
    pads = np.zeros((2, len(chain.shape)), np.int64)
    pads[:, axis] = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    chain.op("Pad", pads.reshape(-1), mode=draw(st.sampled_from(["edge", "reflect", "wrap"])))


def expand(draw: Draw, chain: Chain) -> None:
    target = [draw(st.sampled_from([1, 2, 3])) if e == 1 else e for e in chain.shape]
    chain.op("Expand", np.array([*([draw(st.sampled_from([1, 2]))] if len(target) < 4 else []), *target], np.int64))


def tile(draw: Draw, chain: Chain) -> None:
    repeats = np.ones(len(chain.shape), np.int64)
    repeats[axis_of(draw, chain)] = 2
    chain.op("Tile", repeats)


def gather(draw: Draw, chain: Chain) -> None:
    axis = axis_of(draw, chain)
    extent = chain.shape[axis]
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    table = draw(st.lists(st.integers(-extent, extent - 1), min_size=math.prod(shape), max_size=math.prod(shape)))
    assume(len(chain.shape) + len(shape) - 1 <= 6)
    chain.op("Gather", np.array(table, np.int64).reshape(shape), axis=axis)


def where(draw: Draw, chain: Chain) -> None:
    extents = [draw(st.sampled_from([1, e])) for e in chain.shape]
    bits = draw(st.lists(st.booleans(), min_size=math.prod(extents), max_size=math.prod(extents)))
    branches = draw(st.permutations(["value", np.array(-5)]))
    chain.op("Where", np.array(bits, bool).reshape(extents), *branches)


def convolution(draw: Draw, chain: Chain) -> None:
    assume(len(chain.shape) == 4)
    channels = chain.shape[1]
    weight = np.zeros((channels, 1, 3, 3), np.int64)
    for channel in range(channels):
        weight[channel, 0, draw(st.integers(0, 2)), draw(st.integers(0, 2))] = 1
    dilation = draw(st.sampled_from([1, 2]))
    pads = [draw(st.integers(dilation, 2)) for _ in range(4)]
    strides = [draw(st.integers(1, 2)) for _ in range(2)]
    chain.op("Conv", weight, group=channels, pads=pads, strides=strides, dilations=[dilation, dilation])


STEPS: list[Callable[[Draw, Chain], None]] = [
    reshape,
    reshape,
    transpose,
    transpose,
    slice_,
    roll,
    split,
    concat,
    pad,
    pad_by_mode,
    expand,
    tile,
    gather,
    where,
    convolution,
]


@st.composite
def chains(draw: Draw) -> Chain:
    """Two to six operators on a tensor whose extents are distinct primes."""
    chain = Chain(*draw(st.permutations(PRIMES))[: draw(st.integers(2, 4))])
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=6)):
        step(draw, chain)
        assume(math.prod(chain.shape) <= LARGEST and len(chain.shape) <= 6)
    assume((chain.arrays[chain.value] > 0).any())  # something of the input is left
    return chain


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(chains())
def test_composed_rules_read_what_the_operators_moved(chain: Chain) -> None:
    chain.assert_map_is_exact()
