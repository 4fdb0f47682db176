"""The architectures that must work: every softmax is listed, each local one is one op, and the rest says why not."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

pytest.importorskip("torch")

from attnrewrite.verify.numeric import verify_models
from tests.architectures import (
    all_to_all,
    deployed,
    kernels_and_gates,
    lookalikes,
    mixed_windows,
    mixing_everything,
    near,
    neighborhoods,
    packages,
    shifted_windows,
    slides,
    without_softmax,
)
from tests.architectures.frame import BOTH, Architecture, assert_sites
from tests.passes.rewritten import optimize, written

FAMILIES = (
    slides,
    packages,
    shifted_windows,
    mixed_windows,
    mixing_everything,
    neighborhoods,
    without_softmax,
    kernels_and_gates,
    all_to_all,
    near,
    deployed,
    lookalikes,
)
ARCHITECTURES = {a.name: a for family in FAMILIES for a in family.ARCHITECTURES}

# Rows whose verdict is not reached yet: what is missing.
PENDING: dict[str, str] = {}


def cases() -> list[object]:
    made = []
    for name, architecture in ARCHITECTURES.items():
        for exporter in BOTH:
            marks = [] if exporter in architecture.exporters else [pytest.mark.slow]
            if name in PENDING:
                marks.append(pytest.mark.xfail(reason=PENDING[name], strict=False))
            made.append(pytest.param(architecture, exporter, marks=marks, id=f"{name}-{exporter}"))
    return made


@pytest.mark.parametrize(("architecture", "exporter"), cases())
def test_architecture(architecture: Architecture, exporter: str, tmp_path: Path) -> None:
    if exporter in architecture.fails:
        with pytest.raises(Exception, match=architecture.fails[exporter]):
            architecture.export(exporter)
        return
    path = architecture.export(exporter)
    outcome = optimize(path)
    assert_sites(architecture, outcome)
    if outcome.modified:
        model = written(outcome)
        onnx.checker.check_model(model)
        onnx.save(model, tmp_path / "rewritten.onnx")
        verification = verify_models(path, tmp_path / "rewritten.onnx", trials=2)
        assert verification.passed, verification.explain_failure()
        assert not verification.notes


def test_the_names_are_those_of_the_models() -> None:
    assert len(ARCHITECTURES) == sum(len(family.ARCHITECTURES) for family in FAMILIES)
    assert set(PENDING) <= set(ARCHITECTURES)
