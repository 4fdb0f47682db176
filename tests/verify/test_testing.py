"""The assertions people use must fail on what is wrong, and say what it is."""

from __future__ import annotations

import numpy as np
import pytest

from attnrewrite.errors import UserError
from attnrewrite.localattention.site import Site
from attnrewrite.report import Report
from attnrewrite.testing import assert_equivalent, assert_sites
from tests import tiny

WRONG = {
    "twice as large": lambda: tiny.linear(factor=2.0),
    "shuffled": lambda: tiny.linear(shift_by=3),
    "one element off": lambda: tiny.one_off(tiny.linear(), 1e-3),
    "one element NaN": lambda: tiny.one_off(tiny.linear(), np.nan),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_outputs_fail(wrong):
    with pytest.raises(AssertionError, match=r"not equivalent: .* output y .*element \[0, .*, expected "):
        assert_equivalent(tiny.linear(), WRONG[wrong](), threads=1)


def test_equal_models_pass_as_values_and_as_files(tmp_path):
    path = tiny.save(tmp_path / "model.onnx", tiny.linear(batch="batch"))
    assert_equivalent(path, path, threads=1)
    assert_equivalent(tiny.linear(), tiny.linear(), threads=1)
    assert_equivalent(str(path), tiny.linear(batch="batch"), threads=1)


def test_tolerance_can_be_given():
    slightly = tiny.linear(factor=1.001)
    assert_equivalent(tiny.linear(), slightly, tolerance=2e-3, threads=1)
    with pytest.raises(AssertionError, match=r"allowed 5\.0e-04"):
        assert_equivalent(tiny.linear(), slightly, tolerance=5e-4, threads=1)


def test_original_that_does_not_run_is_no_failed_assertion():
    broken = tiny.linear()
    broken.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(UserError):
        assert_equivalent(broken, broken)


def report(windows: int, left: int) -> Report:
    sites = [Site(f"w{i}", f"/w{i}", "window", "rewrite", "a 7x7 window") for i in range(windows)]
    sites += [
        Site(f"g{i}", f"/g{i}", "global", "leave", "one window covers the map", f"/g{i}/MatMul") for i in range(left)
    ]
    return Report("swin.onnx", tuple(sites), (), 9, 9)


def test_sites_that_are_as_expected_pass():
    assert_sites(report(10, 2), window=10)
    assert_sites(report(10, 2), window=10, left=2, neighborhood=0)
    assert_sites(report(0, 2))


@pytest.mark.parametrize(
    ("expected", "sentence"),
    [
        ({"window": 12}, "expected window=12 rewritten, found window=10 in swin.onnx"),
        ({"window": 9}, "expected window=9 rewritten, found window=10"),
        ({"neighborhood": 10}, "expected neighborhood=10 rewritten, found window=10"),
        ({"window": 10, "neighborhood": 1}, "expected neighborhood=1, window=10 rewritten, found window=10"),
        ({}, "expected nothing rewritten, found window=10"),
        ({"window": 10, "left": 0}, "expected 0 left, found 2"),
    ],
)
def test_other_sites_fail_and_the_left_ones_are_explained(expected, sentence):
    with pytest.raises(AssertionError) as failure:
        assert_sites(report(10, 2), **expected)
    assert sentence in str(failure.value)
    assert "left: global /g1: one window covers the map (at /g1/MatMul)" in str(failure.value)


def test_unknown_kind_is_a_mistake_of_the_test():
    with pytest.raises(TypeError, match="there is no kind 'windows' of site; the kinds are window, grid"):
        assert_sites(report(1, 0), windows=1)


def test_sites_are_read_from_a_model():
    assert_sites(tiny.global_attention(), left=1)
    with pytest.raises(AssertionError, match="expected window=1 rewritten, found nothing"):
        assert_sites(tiny.global_attention(), window=1)
