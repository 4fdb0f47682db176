"""Keys that hold the channels of a cell of pixels each: folded on the map where the cells tile it; else left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest

from attnrewrite.functions import spec_of
from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import WindowGeometry
from tests.models import onnx_movement as movement
from tests.models.onnx_builder import Builder
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

SIZE, HEADS, CHANNELS = (8, 12), 3, 12
WINDOW, TOKENS = (4, 4), 16
RANDOM = np.random.default_rng(0)
QUERY, FOLDED, BIAS = (RANDOM.normal(size=s) for s in ((CHANNELS, CHANNELS), (CHANNELS, 2 * CHANNELS), (2 * CHANNELS,)))


@dataclass(frozen=True)
class Folded:
    """Windows of which `cell` pixels make a key, their channels in the order rows, columns, channels; so the Linear of
    keys and values makes 1 / prod(cell) of the channels.

    across: the two rows of a cell do not lie side by side. turned: the keys of a window's lower half list their pixels
    from below.
    """

    cell: tuple[int, int] = (2, 2)
    shift: tuple[int, int] = (0, 0)
    across: bool = False
    turned: bool = False
    batch: int | str = "batch"

    @property
    def keys(self) -> int:
        return TOKENS // (self.cell[0] * self.cell[1])

    def model(self) -> onnx.ModelProto:
        g, (rows, columns) = Builder(), self.cell
        size, width = rows * columns, CHANNELS // (rows * columns)
        geometry = WindowGeometry(SIZE, WINDOW, self.shift)
        x = g.input("x", [self.batch, *SIZE, CHANNELS])
        windows = movement.Movement().enter(g, x, geometry, CHANNELS)
        made = g.op("Add", g.matmul(windows, FOLDED[:, : 2 * width]), g.constant(BIAS[: 2 * width]))
        if self.across:
            cells = g.transpose(g.reshape(made, -1, rows, 4 // rows, 4, 2, width), 0, 2, 3, 4, 1, 5)
        else:
            view = g.reshape(made, -1, 4 // rows, rows, 4 // columns, columns, 2, width)
            cells = g.transpose(view, 0, 1, 3, 5, 2, 4, 6)
        if self.turned:
            upper, lower = g.split(cells, [1, 1], 1)
            cells = g.concat([upper, g.concat(g.split(lower, [1, 1], 4)[::-1], 4)], 1)
        keys = g.transpose(g.reshape(cells, -1, self.keys, 2, HEADS, size * width // HEADS), 2, 0, 3, 1, 4)
        k, v = (g.squeeze(t, 0) for t in g.split(keys, [1, 1], 0))
        q = g.transpose(g.reshape(g.matmul(windows, QUERY), -1, TOKENS, HEADS, CHANNELS // HEADS), 0, 2, 1, 3)
        weights = g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), axis=-1)
        out = g.reshape(g.transpose(g.op("MatMul", weights, v), 0, 2, 1, 3), -1, TOKENS, CHANNELS)
        return g.model({"y": movement.Movement().leave(g, out, geometry, CHANNELS)})


REWRITTEN = {
    "cells of two by two": Folded(),
    "shifted": Folded(shift=(2, 2)),
    "shifted along the rows": Folded(shift=(0, 2)),
    "rows": Folded((1, 2)),
    "columns": Folded((4, 1)),
    "rows apart": Folded((2, 1), across=True),
    "two images": Folded(shift=(2, 2), batch=2),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_keys_folded_in_windows_are_folded_on_the_map(name: str) -> None:
    case = REWRITTEN[name]
    original = case.model()
    outcome = optimize(original)
    (site,) = outcome.sites
    assert site.verdict == "rewrite", site.reason
    (op,) = local_ops(outcome.graph)
    spec = spec_of(op)
    assert isinstance(spec, FlashWindowAttention)
    small = tuple(e // c for e, c in zip(SIZE, case.cell, strict=True))
    assert (spec.geometry.feature_size, spec.geometry.window_size, spec.geometry.key_size) == (SIZE, WINDOW, small)
    assert spec.geometry.shift_size == case.shift
    # Space to depth is the model's own; nothing else moves a token.
    own = [n for n in outcome.graph.nodes if n.made_by == "move-folds" and n.op == "Transpose"]
    assert [s for s in left_over(outcome.graph) if not any(s.startswith(n.label) for n in own)] == []
    assert len(own) <= sum(c > 1 for c in case.cell)
    feeds = {"x": RANDOM.normal(size=(2, *SIZE, CHANNELS)).astype(np.float32)}
    assert error(run(written(outcome), feeds)["y"], run(original, feeds)["y"]) <= 3e-6


LEFT = {
    "cells that two windows of the map cut": Folded(shift=(1, 0)),
    "pixels in another order": Folded((2, 1), turned=True),
}


@pytest.mark.parametrize("name", LEFT)
def test_cells_that_do_not_tile_the_map_are_left(name: str) -> None:
    case = LEFT[name]
    outcome = optimize(case.model())
    (site,) = outcome.sites
    size = case.cell[0] * case.cell[1]
    assert site.verdict == "leave"
    assert site.reason == f"the channels of one key are those of {size} pixels, so the keys are no pixels of a map"
    assert not outcome.modified
