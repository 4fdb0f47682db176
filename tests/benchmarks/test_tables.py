"""Tables of made-up figures: ratios, roofline arithmetic, and what stands where there is no figure."""

from __future__ import annotations

import pytest

from benchmarks import growth, models, tables, zoo
from benchmarks.contest import Outcome, difference


def figures(ms: float, **more: float) -> dict:
    return {"median_ms": ms, "load_mb": 10.0, "run_mb": 4.0, **more}


ROW = {
    "model": "net",
    "threads": 2,
    "contestants": {
        "onnxruntime": figures(30.0),
        "openvino": figures(12.0),
        "torch-compile": {"failed": "took more than 9 s"},
        "compiled": figures(8.0),
    },
    "gemm_gflops": 100.0,
    "work": {"products": 300_000_000, "attention": 100_000_000, "compulsory": 5_000_000, "moved": 40_000_000},
    "artifact": {"seconds": 31.2, "library_mb": 22.0, "weights_mb": 20.0},
}
PEAK = {"gflops": 110.0, "engine": "compiled", "shape": "8 products", "engines": {"compiled": 110.0}, "copy_gbs": 10.0}


def test_ratios_are_to_each_original_and_to_the_best():
    cells = tables.speed_cells(ROW)
    assert cells == ["net", "2", "30.0", "12.0", "", "failed", "", "8.00", "**3.75 x**", "**1.50 x**", "**1.50 x**"]


def test_roofline_takes_the_peak_of_the_same_contest():
    row = tables.roofline([ROW], {"2": PEAK}).splitlines()[-1]
    # 0.4 GFLOP at 100 GFLOP/s take 4 ms: half of the compiled model's 8 ms, a third of the best peer's 12 ms.
    assert row == "| net | 2 | 0.4 | 25% | 5.0 | 40.0 | 4.00 | 50.0 | 50% | 33% | 50% |"


def test_every_table_has_as_many_cells_as_its_header():
    document = {"machine": {"date": "2026-01-01", "description": "a CPU", "clock": "cpu", "versions": {"torch": "2"}}}
    text = tables.markdown({**document, "peaks": {"2": PEAK}, "rows": [ROW]})
    header = None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        header = header or line.count("|")
        assert line.count("|") == header
    assert text.splitlines()[0] == "2026-01-01, a CPU. torch 2. Times are CPU seconds of one thread."
    assert "* torch-compile on net, 2 threads: failed: took more than 9 s" in text
    assert "| net | 31 | 22.0 | 20.0 | 1.10 |" in text


def test_a_wrong_result_is_marked():
    row = {**ROW, "contestants": {**ROW["contestants"], "compiled": figures(8.0, difference=0.3)}}
    assert "8.00 (differs)" in tables.speed_cells(row)


def test_growth_is_in_milliseconds_and_in_megabytes_beyond_the_output():
    ran = figures(30.0, first_mb=120.0, output_mb=100.0)
    assert growth.cells("net_64", 1, {"onnxruntime": ran, "compiled": {"failed": "optimize: no"}}) == [
        *("net_64", "1", "30.0", "", "failed", "20", "", ""),
    ]


def test_a_row_replaces_the_older_one():
    document = models.merged({"rows": [ROW, {**ROW, "threads": 1}]}, {**ROW, "gemm_gflops": 1.0})
    assert [row["threads"] for row in document["rows"]] == [2, 1]
    assert document["rows"][0]["gemm_gflops"] == 1.0
    assert len(models.merged(document, {**ROW, "model": "other"})["rows"]) == 3


def test_figures_of_another_machine_are_not_continued():
    about = {"description": "a CPU", "clock": "wall"}
    earlier = {"machine": {**about, "date": "2026-01-01"}, "peaks": {"2": PEAK}, "rows": [ROW]}
    same = {"machine": about, "peaks": {}, "rows": []}
    assert models.continued(earlier, same) == {**earlier, "machine": about}
    for other in ({"description": "another CPU"}, {"clock": "cpu"}):
        new = {**same, "machine": {**about, **other}}
        assert models.continued(earlier, new) == new


def test_median_of_an_outcome_is_in_milliseconds():
    loaded = {"load_seconds": 1.0, "load_bytes": 2e6, "first_bytes": 2e6, "run_bytes": 1e6, "output_bytes": 4}
    outcome = Outcome(loaded=loaded, seconds=[0.001, 0.004, 0.002]).to_json()
    assert (outcome["median_ms"], outcome["load_mb"], outcome["runs"]) == (2.0, 2.0, 3)
    assert Outcome(failed="no").to_json() == {"failed": "no"}


def test_differences_see_shapes_and_numbers_that_are_missing():
    import numpy as np

    assert difference(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert difference(np.array([1.0]), np.array([1.0, 4.0])) == float("inf")
    assert difference(np.array([1.0, np.nan]), np.array([1.0, 4.0])) == float("inf")


def test_sizes_are_part_of_a_name():
    assert zoo.model("unfold_k3_56").shapes == ((1, 96, 56, 56),)
    assert zoo.model("swin_tiny_b8").shapes == ((8, 3, 224, 224),)
    assert all(zoo.model(name) for name in zoo.MEASURED)
    with pytest.raises(ValueError, match="there is no model 'unfold_k3_x'"):
        zoo.model("unfold_k3_x")
