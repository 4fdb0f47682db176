"""The report says what was found and done, in every form alike."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from attnrewrite.localattention.site import Reparam, Site
from attnrewrite.report import Report
from attnrewrite.report.document import headline
from attnrewrite.report.html import to_html
from attnrewrite.report.terminal import render, render_site


def window(node: str, shift: int = 0) -> Site:
    return Site(
        id=node.strip("/").replace("/", "."),
        node=node,
        kind="window",
        verdict="rewrite",
        reason="every token lies in its 7x7 window",
        num_heads=3,
        head_dim=32,
        feature_size=(56, 57),
        window_size=(7, 7),
        shift_size=(shift, shift),
        dilation=(1, 1),
        bias="constant",
        mask="shift" if shift else "none",
        pass_name="fuse-window-attention",
    )


GLOBAL = Site("last", "/last/Softmax", "global", "leave", "one window covers the map", reason_node="/last/MatMul")
FOLDED = Reparam(3, "Conv", "rewrite", "/branches/Add", "linear and summed", 300, 100, 1.5e-8, 90_000, 70_000, 0.25)
CHAIN = Reparam(
    1, "Conv", "rewrite", "/norm/BatchNormalization", "linear", 2_000, 1_500, 3e-8, 4_000_000, 3_000_000, 0.5
)
APART = Reparam(2, "Conv", "leave", "/other/Add", "a Relu stands between")

REPORT = Report(
    model="models/<swin>.onnx",
    sites=(window("/a/Softmax"), window("/b/Softmax"), window("/c/Softmax", shift=3), GLOBAL),
    reparam=(FOLDED, replace(FOLDED, node="/second/Add", max_weight_error=4e-8), CHAIN, APART),
    nodes_before=590,
    nodes_after=214,
    target="cuda:sm_90",
    precision="fp32",
    passes={"fuse-window-attention": 0.91},
    seconds={"read": 0.5, "compile": 51.0},
    verification={
        "passed": True,
        "rewritten": {"max_error": 3.2e-7, "tolerance": 1e-5, "passed": True},
        "exact": [{"node": "a", "site": "/a/Softmax", "passed": True, "detail": "the integer maps are equal"}],
        "comparisons": [],
        "notes": ["the original itself does not run at batch 2"],
        "failures": [],
    },
    compile={"target": "cuda:sm_90", "library": "model.so", "bytes": 113_000_000, "seconds": 51.0},
    gains={
        "threads": 1,
        "timings": [
            {"name": "original", "engine": "ONNX Runtime", "median_ms": 100.0},
            {"name": "compiled", "engine": "attnrewrite", "median_ms": 80.0},
        ],
    },
)
NOTHING = Report("resnet.onnx", (), (), 69, 69)


def terminal(report: Report, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(report))
    return console.export_text()


def test_json_has_the_contract_s_fields():
    document = REPORT.to_json()
    assert {"model", "sites", "reparam", "nodes_before", "nodes_after"} <= set(document)
    assert document["sites"][2] == {
        "id": "c.Softmax",
        "node": "/c/Softmax",
        "kind": "window",
        "verdict": "rewrite",
        "reason": "every token lies in its 7x7 window",
        "num_heads": 3,
        "head_dim": 32,
        "feature_size": [56, 57],
        "window_size": [7, 7],
        "shift_size": [3, 3],
        "dilation": [1, 1],
        "bias": "constant",
        "mask": "shift",
        "pass": "fuse-window-attention",
    }
    assert document["sites"][3]["reason_node"] == "/last/MatMul"
    assert document["reparam"][0]["branches"] == 3


@pytest.mark.parametrize("report", [REPORT, NOTHING])
def test_json_round_trip(report):
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_parts_that_did_not_run_are_left_out():
    assert set(NOTHING.to_json()) == {"model", "sites", "reparam", "nodes_before", "nodes_after", "passes", "seconds"}


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (
            REPORT,
            "4 attention sites: 3 rewritten (1 of them shifted), 1 left (1 global); "
            "2 groups of re-parameterised branches folded",
        ),
        (NOTHING, "No attention in this model; nothing to rewrite"),
        (
            Report("vit.onnx", (GLOBAL,), (), 9, 9),
            "1 attention site: 0 rewritten, 1 left (1 global); nothing to rewrite",
        ),
    ],
)
def test_headline(report, sentence):
    assert headline(report) == sentence


def test_terminal_groups_sites_that_read_alike():
    text = terminal(REPORT)
    assert re.search(r"2\s+window\s+56x57\s+7x7\s+3 x 32\s+constant\s+none\s+rewritten", text)
    assert re.search(r"1\s+window\s+56x57\s+7x7\s+3x3\s+3 x 32\s+constant\s+shift\s+rewritten", text)
    assert "left: one window covers the map (at /last/MatMul)" in text
    assert re.search(r"2 +3 +Conv +600 → 200 +180 k → 140 k +4.0e-08 \(0.25 ulp\)", text)
    assert re.search(r"1 +in a row +Conv +2 k → 1.5 k +4 M → 3 M +3.0e-08 \(0.50 ulp\)", text)
    assert "2 branches at /other/Add left: a Relu stands between" in text
    assert "no more multiplications" in text
    assert "590 nodes before, 214 after" in text
    assert "largest error 3.2e-07 of max |output|, within 1.0e-05" in text
    assert "compiled in attnrewrite: 80.00 ms, 1.25 x the original's speed" in text


def test_failures_are_said():
    failed = {"passed": False, "rewritten": {"max_error": "inf", "tolerance": 1e-5, "passed": False}}
    text = terminal(
        Report("m.onnx", (), (), 1, 1, verification=failed, compile={"target": "arm", "error": "no linker"})
    )
    assert "largest error inf of max |output|, NOT within 1.0e-05" in text
    assert "failed for arm: no linker" in text


def test_site_in_full():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_site(window("/c/Softmax", shift=3)))
    text = console.export_text()
    for label, value in {"kind": "window", "feature size": "56x57", "shift size": "3x3", "mask": "shift"}.items():
        assert re.search(rf"{label}\s+{value}", text)


class Page(HTMLParser):
    """Collects what a browser would have to fetch, and whether tags are balanced."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("report", [REPORT, NOTHING])
def test_page_is_whole_and_self_contained(report):
    html = to_html(report)
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.fetched == []
    assert "url(" not in html
    assert headline(report) in html.replace("&#39;", "'")


def test_names_of_the_model_are_escaped():
    html = to_html(REPORT)
    assert "<swin>" not in html
    assert "models/&lt;swin&gt;.onnx" in html


def test_page_lists_every_group_of_branches_and_chains_together():
    html = to_html(REPORT)
    for place in ("/branches/Add", "/second/Add", "/norm/BatchNormalization", "2 branches at /other/Add"):
        assert f">{place}</td>" in html
    assert "a Relu stands between" in html


def test_page_shows_the_largest_error_of_all_compared():
    assert REPORT.verification is not None
    for compiled, shown in (({"max_error": 4.5e-6}, "4.5e-06"), ({"max_error": "inf"}, "inf"), (None, "3.2e-07")):
        verification = {**REPORT.verification}
        if compiled is not None:
            verification["compiled"] = {**compiled, "tolerance": 1e-4, "passed": True}
        html = to_html(replace(REPORT, verification=verification))
        assert f"<b>{shown}</b><span>largest error" in html
