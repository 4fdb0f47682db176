"""Blocks that run on windows: the partition is moved to their attentions and disappears, or nothing changes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from attnrewrite.facts import Facts
from attnrewrite.frontend.onnx import read
from attnrewrite.localattention.blocks import find_block
from attnrewrite.verify.exact import verify_exact
from tests.models.onnx_moved_blocks import AROUND, NEAR_MISSES, SIZE, WINDOWS, moved_block, rows_of_tokens
from tests.passes.rewritten import left_over, optimize, sites, written
from tests.running import error, run

# float32 in another order of summation: 1e-6 is left by up to 40 operators, 1e-4 by none.
BOUND = 1e-5


def assert_same_numbers(model: onnx.ModelProto, changed: onnx.ModelProto, batches: tuple[int, ...] = (1, 2, 3)) -> None:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    for batch in batches:
        x = np.random.default_rng(batch).standard_normal((batch, *shape)).astype(np.float32)
        for name, expected in run(model, {"x": x}).items():
            assert error(run(changed, {"x": x})[name], expected) <= BOUND


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("spelling", AROUND)
def test_block_becomes_ops_on_the_map(spelling: str, blocks: int) -> None:
    around = AROUND[spelling]
    model = moved_block(around, blocks)
    outcome = optimize(model)
    assert sites(outcome) == Counter({(around.kind, "rewrite"): blocks}), [s.reason for s in outcome.sites]
    assert outcome.rewrites["move-partitions"] == 1
    assert not left_over(outcome.graph)
    assert len(outcome.graph.nodes) < outcome.nodes_before
    assert_same_numbers(model, written(outcome))
    assert [c.passed for c in verify_exact(read(model), read(written(outcome)))] == [True] * blocks


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spelling", AROUND)
def test_block_of_a_static_batch(spelling: str, batch: int) -> None:
    model = moved_block(AROUND[spelling], batch=batch)
    outcome = optimize(model)
    assert sites(outcome) == Counter({(AROUND[spelling].kind, "rewrite"): 1}), [s.reason for s in outcome.sites]
    assert not left_over(outcome.graph)
    assert_same_numbers(model, written(outcome), (batch,))


@pytest.mark.parametrize("spelling", AROUND)
def test_constants_that_differ_from_token_to_token_are_placed_on_the_map(spelling: str) -> None:
    model = moved_block(AROUND[spelling], position=True)
    outcome = optimize(model)
    assert sites(outcome) == Counter({(AROUND[spelling].kind, "rewrite"): 1}), [s.reason for s in outcome.sites]
    assert not left_over(outcome.graph)
    assert_same_numbers(model, written(outcome))


def test_order_of_a_block_is_that_of_its_windows() -> None:
    graph = read(moved_block(AROUND["windows"]))
    facts = Facts(graph)
    (block,) = [b for b in (find_block(facts, node) for node in graph.nodes) if b is not None]
    assert block.entry.spatial == SIZE
    for value, order in block.orders.items():
        assert order.in_place or np.array_equal(order.table, WINDOWS.pixels().reshape(-1)), value
    assert all(block.orders[v].in_place for v in block.exits)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_partition_that_would_not_disappear_stays(name: str) -> None:
    model = NEAR_MISSES[name]()
    moved = optimize(model, ["move-partitions"])
    assert moved.rewrites["move-partitions"] == 0
    assert str(moved.graph) == str(read(model))
    assert_same_numbers(model, written(optimize(model)))


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_windows_that_never_become_a_map_are_rows_of_tokens(batch: int | str) -> None:
    model = rows_of_tokens(batch)
    outcome = optimize(model)
    assert sites(outcome) == Counter({("window", "rewrite"): 2}), [s.reason for s in outcome.sites]
    for site in outcome.sites:
        assert (site.feature_size, site.window_size) == ((SIZE[0] * SIZE[1],), (WINDOWS.tokens_per_window,))
    assert len(outcome.graph.nodes) <= outcome.nodes_before
    assert_same_numbers(model, written(outcome), (batch,) if isinstance(batch, int) else (1, 2, 3))
    assert [c.passed for c in verify_exact(read(model), read(written(outcome)))] == [True, True]


def test_a_partition_of_one_attention_alone_is_not_left_behind() -> None:
    """Nothing else reads the windows, so their movement belongs to the site; it does not go away."""
    outcome = optimize(rows_of_tokens(shared=False))
    (site,) = outcome.sites
    assert (site.verdict, site.kind) == ("leave", "other")
    assert site.reason == "the tokens are rearranged before the attention in a way that its output does not undo"
    assert not outcome.modified
