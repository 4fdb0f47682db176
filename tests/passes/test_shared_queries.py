"""One set of queries for all windows (GC ViT): recognised however it meets the windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest

from attnrewrite.frontend.onnx import read
from attnrewrite.functions import operands_of, spec_of
from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import WindowGeometry
from attnrewrite.verify.exact import verify_exact
from tests.models.onnx_builder import Builder
from tests.models.onnx_parts import heads_by_slices
from tests.models.onnx_spellings import UNSHIFTED, WINDOW, sample_input
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, Triple, WindowSpelling
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

TOLERANCE = 5e-6  # as in test_spellings
TOKENS, WINDOWS = 16, 6

Spread = Callable[[Builder, str, int], str]


def by_expand(g: Builder, queries: str, windows: int) -> str:
    """[B, N, C] -> [B * nW, N, C], every window of an image after the other."""
    one = g.reshape(queries, -1, 1, TOKENS, CHANNELS)
    return g.reshape(g.op("Expand", one, g.constant([1, windows, TOKENS, CHANNELS])), -1, TOKENS, CHANNELS)


def by_concat(g: Builder, queries: str, windows: int) -> str:
    return g.reshape(g.concat([queries] * windows, 1), -1, TOKENS, CHANNELS)


def by_gather(g: Builder, queries: str, windows: int) -> str:
    return g.gather(queries, np.repeat(np.arange(2), windows), 0)


def columns_first(g: Builder, queries: str, windows: int) -> str:
    """The queries of every window are listed column by column."""
    order = np.arange(TOKENS).reshape(4, 4).T.reshape(-1)
    return by_concat(g, g.gather(queries, order, 1), windows)


@dataclass(frozen=True)
class Case:
    """Window attention whose queries come from an input `asked` [B, N, C]; spread: to [B * nW, N, C]."""

    spread: Spread
    spelling: WindowSpelling = WINDOW
    sets: int = 1

    def model(self) -> onnx.ModelProto:
        windows = self.spelling.geometry.num_windows

        def heads(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
            _, k, v = heads_by_slices(g, spelling, tokens)
            asked = g.input("asked", [self.spelling.batch, self.sets * TOKENS, CHANNELS])
            q = g.reshape(self.spread(g, asked, windows), -1, TOKENS, HEADS, HEAD_DIM)
            return g.transpose(q, 0, 2, 1, 3), k, v

        return replace(self.spelling, heads=heads).model()

    def inputs(self, batch: int) -> dict[str, np.ndarray]:
        asked = np.random.default_rng(3).normal(size=(batch, self.sets * TOKENS, CHANNELS))
        return {**sample_input(self.spelling, batch), "asked": asked.astype(np.float32)}


PADDED = replace(WINDOW, geometry=WindowGeometry((7, 10), (4, 4), (2, 2)))
SHARED = {
    "expand": Case(by_expand),
    "expand-unshifted": Case(by_expand, UNSHIFTED),
    "expand-padded": Case(by_expand, PADDED),
    "expand-dynamic-batch": Case(by_expand, replace(WINDOW, batch="batch")),
    "concat-dynamic-batch": Case(by_concat, replace(UNSHIFTED, batch="batch")),
    "gather": Case(by_gather),
    "rearranged-before": Case(columns_first),
}


@pytest.mark.parametrize("name", SHARED)
def test_one_set_of_queries_for_all_windows_is_recognised(name: str) -> None:
    case = SHARED[name]
    outcome = optimize(case.model())
    (site,) = outcome.sites
    assert site.verdict == "rewrite", site.reason
    assert "one set of queries for all of them" in site.reason
    assert not left_over(outcome.graph)
    (node,) = local_ops(outcome.graph)
    spec = spec_of(node)
    assert isinstance(spec, FlashWindowAttention) and spec.shared_query
    assert spec.geometry == case.spelling.geometry
    assert operands_of(node)["query"].known_shape[1:] == (4, 4, CHANNELS)
    (check,) = verify_exact(read(case.model()), read(written(outcome)))
    assert check.passed, check.detail
    for batch in (1, 3) if isinstance(case.spelling.batch, str) else (2,):
        inputs = case.inputs(batch)
        expected = run(case.model(), inputs)["y"].astype(np.float64)
        assert error(run(written(outcome), inputs)["y"], expected) <= TOLERANCE


def images_in_turn(g: Builder, queries: str, windows: int) -> str:
    """The windows of both images ask with the queries of image 0, 1, 0, 1 ..."""
    return g.gather(queries, np.tile(np.arange(2), windows), 0)


def first_window_mirrored(g: Builder, queries: str, windows: int) -> str:
    mirrored = g.gather(queries, np.arange(TOKENS)[::-1], 1)
    return g.reshape(g.concat([mirrored, *[queries] * (windows - 1)], 1), -1, TOKENS, CHANNELS)


def a_set_per_row_of_windows(g: Builder, queries: str, windows: int) -> str:
    split = g.reshape(queries, -1, 2, TOKENS, CHANNELS)
    sets = g.gather(split, np.repeat(np.arange(2), windows // 2), 1)
    return g.reshape(sets, -1, TOKENS, CHANNELS)


def merge_columns_first(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(tokens, -1, columns, rows, height, width, channels), 0, 2, 3, 1, 4, 5)
    return g.reshape(x, -1, *geometry.padded_size, channels)


ELSEWHERE = replace(UNSHIFTED, movement=replace(UNSHIFTED.movement, merge=merge_columns_first))
NOT_SHARED = {
    "images-in-turn": (Case(images_in_turn), "the queries that all windows share are another image's"),
    "one-window-mirrored": (Case(first_window_mirrored), "share some of their queries: asked holds 32, 192 are asked"),
    "two-sets": (Case(a_set_per_row_of_windows, sets=2), "share some of their queries"),
    "put-back-elsewhere": (
        Case(by_expand, ELSEWHERE),
        "one set of queries serves all windows, whose keys are not the pixels that their output returns to",
    ),
}


@pytest.mark.parametrize("name", NOT_SHARED)
def test_queries_that_not_all_windows_share_are_left(name: str) -> None:
    case, reason = NOT_SHARED[name]
    outcome = optimize(case.model())
    (site,) = outcome.sites
    assert (site.verdict, reason in site.reason) == ("leave", True), site.reason
    assert not outcome.modified
