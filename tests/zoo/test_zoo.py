"""Real models: every softmax has the verdict that its architecture calls for, and the numbers stay. `make zoo`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

pytest.importorskip("torch")

from attnrewrite.localattention.site import Site
from tests.zoo.coverage import Row, page
from tests.zoo.measure import ROOT, Result, measured
from tests.zoo.model import TORCHSCRIPT, Model
from tests.zoo.models import MODELS, PENDING


def cases() -> list[object]:
    made = []
    for model in MODELS.values():
        for exporter in model.exporters:
            marks = [pytest.mark.slow]
            if model.name in PENDING:
                marks.append(pytest.mark.xfail(reason=PENDING[model.name], strict=False))
            made.append(pytest.param(model, exporter, marks=marks, id=f"{model.name}-{exporter}"))
    return made


@pytest.mark.parametrize(("model", "exporter"), cases())
def test_model(model: Model, exporter: str) -> None:
    if not model.installed:
        pytest.skip(f"{model.distribution} is not installed")
    result = measured(model, exporter, ROOT / "build" / "zoo" / model.name / exporter)
    if result.stage == "export":
        pytest.skip(f"not exported: {result.failed}")
    assert not result.failed
    assert not model.complaints(result.found)
    rewritten = sum(site.verdict == "rewrite" for site in result.found)
    assert result.proved == rewritten
    if rewritten:
        assert result.error is not None
        assert result.tolerance is not None
        assert result.error <= result.tolerance


def site(verdict: str, reason: str = "", kind: str = "window") -> Site:
    return Site("site0", "softmax", kind, verdict, reason, "node")  # type: ignore[arg-type]


MODEL = Model("m", "torch", "windows", lambda: None, (), {"window": 1}, {"the same [0-9]+ keys": 1})


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ([site("rewrite"), site("leave", "the same 4 keys", "global")], []),
        ([site("rewrite")], ["1 more sites should be left because 'the same [0-9]+ keys'"]),
        ([site("leave", "the same 4 keys")], ["0 of kind window rewritten, expected 1"]),
        (
            [site("rewrite", kind="grid"), site("leave", "the same 4 keys")],
            ["0 of kind window rewritten, expected 1", "1 of kind grid rewritten, expected 0"],
        ),
        (
            [site("rewrite"), site("leave", "the same 4 keys"), site("leave", "the same 5 keys", "global")],
            ["softmax is left: global, the same 5 keys (at node)"],
        ),
    ],
)
def test_what_is_not_as_expected_is_said(sites: list[Site], said: list[str]) -> None:
    assert sorted(MODEL.complaints(sites)) == sorted(said)


def test_the_page_lists_every_model_that_was_not_measured() -> None:
    sites = tuple(s.to_json() for s in (site("rewrite"), site("leave", "the same 4 keys", "global")))
    done = Result(
        "m", TORCHSCRIPT, "", seconds=0.5, nodes_before=30, nodes_after=12, sites=sites, error=2e-6, tolerance=1e-5
    )
    rows = [
        Row(MODEL, TORCHSCRIPT, done),
        Row(MODEL, "dynamo", Result("m", "dynamo", "", failed="ValueError: a | b", stage="export")),
        Row(Model("absent", "nothing_of:the-kind", "windows", lambda: None, ()), TORCHSCRIPT, None),
    ]
    text = page(rows, {})
    assert "1 models in 1 exports: 2 softmaxes found, 1 rewritten, 1 left" in text
    assert "| m | windows | torchscript | 2 | 1 window | 1 global | 0.5 | 30 → 12 | 2e-06 of 1e-05 |" in text
    assert "| 1 | global | the same 4 keys | m |" in text
    assert "| m | dynamo | ValueError: a \\| b |" in text
    assert "absent (the-kind)." in text


@pytest.mark.slow
def test_a_child_that_takes_too_long_is_a_failed_row() -> None:
    with tempfile.TemporaryDirectory() as folder:
        name = next(iter(MODELS))
        result = measured(MODELS[name], TORCHSCRIPT, Path(folder), seconds=0.01)
    assert (result.failed, result.stage) == ("took more than 0 s", "run")
