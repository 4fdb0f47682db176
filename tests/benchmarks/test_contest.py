"""A contest of two processes: one runs a model, the other fails, and both leave an outcome."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import machine
from benchmarks.contest import Limits, compete
from benchmarks.workshop import Workshop
from tests import tiny


def test_a_contestant_that_fails_leaves_its_reason(tmp_path):
    workshop = Workshop(tmp_path)
    model = tiny.save(tmp_path / "linear.onnx", tiny.linear())
    jobs = {
        "onnxruntime": workshop.job("onnxruntime", model, 1, None, 0.01),
        "compiled": workshop.job("compiled", model, 1, tmp_path / "nothing", 0.01),
    }
    outcomes = compete(jobs, rounds=2)
    assert outcomes["onnxruntime"].failed is None
    assert outcomes["onnxruntime"].to_json()["median_ms"] > 0
    assert len(outcomes["onnxruntime"].seconds) >= 4
    assert "nothing" in (outcomes["compiled"].failed or "")


def test_a_contestant_over_its_limit_is_stopped(tmp_path):
    workshop = Workshop(tmp_path)
    model = tiny.save(tmp_path / "linear.onnx", tiny.linear())
    jobs = {"onnxruntime": workshop.job("onnxruntime", model, 1, None, 0.01)}
    assert compete(jobs, limits=Limits(load_seconds=0.0))["onnxruntime"].failed == "took more than 0 s"


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_engines_agree_on_a_chain_of_products(tmp_path):
    workshop = Workshop(tmp_path)
    model = workshop.gemm(16, 32)
    jobs = {kind: workshop.job(kind, model, 1, None, 0.01) for kind in ("onnxruntime", "openvino")}
    outcomes = compete(jobs, rounds=1)
    assert outcomes["openvino"].difference is not None
    assert outcomes["openvino"].difference < 1e-5
    assert machine.gemm_flops(16, 32) == 8 * 2 * 16 * 32 * 32
