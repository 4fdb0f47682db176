"""Dense attention whose constant mask leaves every token its window is window attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from attnrewrite.frontend.onnx import read
from attnrewrite.functions import spec_of
from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import WindowGeometry
from attnrewrite.verify.exact import verify_exact
from tests.models.onnx_borders import DenseSpelling
from tests.models.onnx_spellings import sample_input
from tests.models.onnx_windows import Expected
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

TOLERANCE = 5e-6  # as in test_spellings


def window_of_each(geometry: WindowGeometry) -> np.ndarray:
    """int64 [P, N]: for every pixel the pixels of its window."""
    pixels = geometry.pixels()
    table = np.empty((pixels.size, pixels.shape[1]), np.int64)
    table[pixels] = pixels[:, None, :]
    return table


def dense(geometry: WindowGeometry, **changes: object) -> DenseSpelling:
    expected = Expected("window", geometry, "none", "constant")
    return replace(DenseSpelling(expected, window_of_each(geometry)), **changes)  # type: ignore[arg-type]


PLAIN = WindowGeometry((6, 8), (3, 4), (0, 0))
WINDOWS = {
    "added": dense(PLAIN),
    "where": dense(PLAIN, mask="where"),
    "allowed": dense(PLAIN, mask="where-allowed"),
    "lowest": dense(PLAIN, mask="lowest"),
    "biased": dense(PLAIN, bias=True),
    "shifted": dense(WindowGeometry((6, 8), (3, 4), (1, 3)), bias=True),
    "sequence": dense(WindowGeometry((12,), (4,), (0,))),
    "sequence-shifted": dense(WindowGeometry((12,), (4,), (3,)), bias=True),
    "clip": dense(WindowGeometry((4, 4, 6), (2, 2, 3), (0, 1, 0)), bias=True),
    "stripes": dense(WindowGeometry((6, 8), (6, 2), (0, 0))),
    "batch-symbolic": dense(PLAIN, batch="batch", bias=True),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_that_a_mask_leaves_are_recognised(name: str) -> None:
    spelling = WINDOWS[name]
    model = spelling.model()
    outcome = optimize(model)
    (site,) = outcome.sites
    assert site.verdict == "rewrite", site.reason
    assert not left_over(outcome.graph)
    (node,) = local_ops(outcome.graph)
    spec = spec_of(node)
    assert isinstance(spec, FlashWindowAttention)
    wanted = np.sort(spelling.expected.geometry.pixels(), axis=1)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.unique(np.sort(spec.geometry.pixels(), axis=1), axis=0), np.unique(wanted, axis=0))
    (check,) = verify_exact(read(model), read(written(outcome)))
    assert check.passed, check.detail
    inputs = sample_input(spelling, 2)
    expected = run(model, inputs)["y"].astype(np.float64)
    assert error(run(written(outcome), inputs)["y"], expected) <= TOLERANCE


@dataclass(frozen=True)
class Changed(DenseSpelling):
    """Of the pairs (query, key) given, those excluded are not, and the others are."""

    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def excluded(self) -> np.ndarray:
        excluded = super().excluded.copy()
        for pair in self.pairs:
            excluded[pair] = not excluded[pair]
        return excluded


def changed(*pairs: tuple[int, int]) -> Changed:
    return Changed(Expected("window", PLAIN, "none", "constant"), window_of_each(PLAIN), pairs=pairs)


NO_WINDOWS = {
    "one-key-fewer": changed((0, 1)),
    "one-key-more": changed((0, 4)),
    "another-key": changed((0, 1), (0, 4)),
    "two-tokens-exchanged": changed(*((q, k) for q in (0, 47) for k in range(48) if (k % 8 < 4) == (k // 8 < 3))),
    "penalised": dense(PLAIN, mask="-100"),
}


@pytest.mark.parametrize("name", NO_WINDOWS)
def test_a_mask_that_leaves_other_sets_leaves_the_model_alone(name: str) -> None:
    outcome = optimize(NO_WINDOWS[name].model())
    (site,) = outcome.sites
    assert (site.verdict, bool(site.reason)) == ("leave", True)
    assert not outcome.modified
