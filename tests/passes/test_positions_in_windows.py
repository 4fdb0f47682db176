"""Constants that differ from token to token of a window (rotary and absolute positions, gains) move onto the map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from attnrewrite.functions import operands_of
from attnrewrite.localattention.geometry import WindowGeometry
from tests.models.onnx_builder import Builder
from tests.models.onnx_halos import HaloSpelling, by_im2col, halo
from tests.models.onnx_parts import heads_by_slices
from tests.models.onnx_spellings import UNSHIFTED, WINDOW, sample_input
from tests.models.onnx_windows import CHANNELS, HEADS, Triple, WindowSpelling
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

TOLERANCE = 5e-6  # as in test_spellings
TOKENS, PAIRS = 16, 2  # the first 2 * PAIRS of a head's 5 channels are turned
RNG = np.random.default_rng(2)
ANGLES = RNG.normal(size=(TOKENS, PAIRS))
POSITIONS = RNG.normal(size=(TOKENS, CHANNELS))
GAINS = RNG.uniform(0.5, 2.0, size=(TOKENS, 1))

Turn = Callable[[Builder, str], str]


def by_halves(g: Builder, x: str) -> str:
    """x * cos + rotate_half(x) * sin; rotate_half(x) = concat(-x2, x1)."""
    turned, rest = g.split(x, [2 * PAIRS, 1], 3)
    first, second = g.slice(turned, 0, PAIRS, 3), g.slice(turned, PAIRS, 2 * PAIRS, 3)
    half = g.concat([g.op("Neg", second), first], 3)
    cosines, sines = (np.concatenate([f(ANGLES)] * 2, axis=1) for f in (np.cos, np.sin))
    return g.concat([g.op("Add", g.mul(turned, cosines), g.mul(half, sines)), rest], 3)


def by_pairs(g: Builder, x: str) -> str:
    """Neighbouring channels are a pair: stack((-x[1::2], x[::2])) flattened."""
    turned, rest = g.split(x, [2 * PAIRS, 1], 3)
    even, odd = g.slice(turned, 0, 2 * PAIRS, 3, 2), g.slice(turned, 1, 2 * PAIRS, 3, 2)
    stacked = g.concat([g.unsqueeze(g.op("Neg", odd), 4), g.unsqueeze(even, 4)], 4)
    half = g.reshape(stacked, -1, HEADS, TOKENS, 2 * PAIRS)
    cosines, sines = (np.repeat(f(ANGLES), 2, axis=1) for f in (np.cos, np.sin))
    return g.concat([g.op("Add", g.mul(turned, cosines), g.mul(half, sines)), rest], 3)


def by_parts(g: Builder, x: str) -> str:
    """concat(x1 cos - x2 sin, x2 cos + x1 sin, rest)."""
    first, second, rest = g.split(x, [PAIRS, PAIRS, 1], 3)
    one = g.op("Sub", g.mul(first, np.cos(ANGLES)), g.mul(second, np.sin(ANGLES)))
    two = g.op("Add", g.mul(second, np.cos(ANGLES)), g.mul(first, np.sin(ANGLES)))
    return g.concat([one, two, rest], 3)


def turned(turn: Turn, of: WindowSpelling = WINDOW) -> WindowSpelling:
    """Queries and keys are turned by an angle that depends on their place in the window."""

    def heads(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
        q, k, v = heads_by_slices(g, spelling, tokens)
        return turn(g, q), turn(g, k), v

    return replace(of, heads=heads)


def on_tokens(change: Turn, of: WindowSpelling = WINDOW) -> WindowSpelling:
    """The tokens [G, N, C] of a window are changed before the Linear."""
    return replace(of, heads=lambda g, spelling, tokens: heads_by_slices(g, spelling, change(g, tokens)))


def add_positions(g: Builder, tokens: str) -> str:
    return g.add(tokens, POSITIONS)


def gains(g: Builder, x: str) -> str:
    return g.mul(x, GAINS)


def values_gained(of: WindowSpelling = WINDOW) -> WindowSpelling:
    def heads(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
        q, k, v = heads_by_slices(g, spelling, tokens)
        return q, k, gains(g, v)

    return replace(of, heads=heads)


def output_gained(g: Builder, weights: str, v: str) -> str:
    return gains(g, g.op("MatMul", weights, v))


PADDED = WindowGeometry((7, 10), (4, 4), (2, 2))
MOVED: dict[str, WindowSpelling] = {
    "rotary-halves": turned(by_halves),
    "rotary-pairs": turned(by_pairs),
    "rotary-parts": turned(by_parts),
    "rotary-unshifted": turned(by_halves, UNSHIFTED),
    "rotary-dynamic-batch": turned(by_pairs, replace(WINDOW, batch="batch")),
    "rotary-inner-only": replace(turned(by_parts), project="map"),
    "positions": on_tokens(add_positions),
    "positions-dynamic-batch": on_tokens(add_positions, replace(WINDOW, batch="batch")),
    "gains": on_tokens(gains),
    "gains-of-values": values_gained(),
    "gains-behind": replace(WINDOW, weighting=output_gained),
    "gains-behind-padded": replace(WINDOW, weighting=output_gained, geometry=PADDED),
}


@pytest.mark.parametrize("case", MOVED)
def test_positions_inside_windows_become_positions_on_the_map(case: str) -> None:
    spelling = MOVED[case]
    outcome = optimize(spelling.model())
    (site,) = outcome.sites
    assert site.verdict == "rewrite", site.reason
    assert not left_over(outcome.graph)
    (node,) = local_ops(outcome.graph)
    assert operands_of(node)["query"].known_shape[1:] == (*spelling.geometry.feature_size, CHANNELS)
    for batch in (1, 3) if isinstance(spelling.batch, str) else (2,):
        inputs = sample_input(spelling, batch)
        expected = run(spelling.model(), inputs)["y"].astype(np.float64)
        assert error(run(written(outcome), inputs)["y"], expected) <= TOLERANCE


def another_angle_per_window(g: Builder, x: str) -> str:
    """Every window of both images has gains of its own: the batch elements differ, the map holds both."""
    return g.mul(x, RNG.uniform(0.5, 2.0, size=(12, 1, TOKENS, 1)))


def test_gains_of_every_image_are_kept_apart() -> None:
    spelling = values_gained()
    spelling = replace(spelling, weighting=lambda g, w, v: another_angle_per_window(g, g.op("MatMul", w, v)))
    model = spelling.model()
    inputs = sample_input(spelling)
    outcome = optimize(model)
    assert [s.verdict for s in outcome.sites] == ["rewrite"], outcome.sites[0].reason
    assert error(run(written(outcome), inputs)["y"], run(model, inputs)["y"].astype(np.float64)) <= TOLERANCE


def gained_in_every_halo(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """Keys and values of overlapping windows, each times a gain of its place in the window: a pixel has several."""
    return g.mul(by_im2col(g, x, geometry, channels), RNG.uniform(0.5, 2.0, size=(geometry.keys_per_window, 1)))


def keys_of_two_tokens(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """Keys are added to themselves with two tokens of every window exchanged; the queries are those of one token."""
    q, k, v = heads_by_slices(g, spelling, tokens)
    order = np.arange(TOKENS)
    order[[3, 4]] = order[[4, 3]]
    exchanged = g.gather(k, order, 2)
    return q, g.op("Add", exchanged, g.mul(k, 0.5)), v


LEFT: dict[str, tuple[WindowSpelling | HaloSpelling, str]] = {
    "halo-gained": (halo(gathering=gained_in_every_halo), "one pixel needs two values of"),
    "two-tokens-added": (replace(WINDOW, heads=keys_of_two_tokens), "x is read at two different places for one token"),
    "padded-keys-turned": (turned(by_halves, replace(WINDOW, geometry=PADDED)), "padded tokens get different numbers"),
    "padded-tokens-with-positions": (
        on_tokens(add_positions, replace(WINDOW, geometry=PADDED)),
        "padded tokens get different numbers",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_no_single_vector_of_a_pixel_is_left_alone(case: str) -> None:
    spelling, reason = LEFT[case]
    outcome = optimize(spelling.model())
    (site,) = outcome.sites
    assert (site.verdict, outcome.modified) == ("leave", False)
    assert site.reason.startswith(reason), site.reason
