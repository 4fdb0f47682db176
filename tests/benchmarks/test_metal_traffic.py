"""The counted rows are what their names say, and their least is what inputs and outputs take."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from benchmarks import metal_traffic
from tests.metal.conftest import emulator_cache  # noqa: F401


def test_a_linear_layer_moves_at_least_its_operands() -> None:
    row = metal_traffic.gemm(10, 12, 20, "float32")
    moved = metal_traffic.measure(row)
    assert moved.least == 4 * (10 * 12 + 12 * 20 + 20 + 10 * 20)
    assert moved.requested >= moved.per_group >= moved.least


def test_rows_are_chosen_by_the_beginnings_of_their_names() -> None:
    names = [row.name for row in metal_traffic.rows_named(["slide", "window-16-keys"], "float16")]
    assert names == ["window-16-keys-24", "slide-3", "slide-7"]


@pytest.mark.slow
def test_an_op_moves_less_than_its_original() -> None:
    (row,) = metal_traffic.rows_named(["window-4"], "float32")
    line, _ = metal_traffic.cells(row)
    assert float(line[-1]) > 1
