"""The GPU benchmark, as far as a machine without one shows it: its rows compute the same, and its tables add up."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from benchmarks import gpu, gpu_rows  # noqa: E402
from benchmarks.gpu_clock import Clock  # noqa: E402


def dry(level: str, words: str) -> Any:
    (site,) = [s for s in gpu_rows.sites_of(level, True) if words in f"{gpu.label(s)}, {s.dtype}"]
    return site


@pytest.mark.parametrize(
    ("level", "words", "peers"),
    [
        ("op", "fp32", ["naive", "sdpa", "flex", "torch.compile", "attnrewrite"]),
        ("map", "shift 3, batch 1, fp16", ["chain", "chain of sdpa", "torch.compile", "attnrewrite"]),
        ("neighbourhood", "fp32", ["unfold", "torch.compile", "attnrewrite"]),
    ],
)
def test_contestants_of_a_row_compute_the_same(level: str, words: str, peers: list[str]) -> None:
    row = gpu.measure(dry(level, words), Clock(dry=True), None)
    found = [name for name, result in row["results"].items() if "failed" not in result]
    assert [name for name in found if name != "natten"] == peers
    assert row["moved"] > 0 < row["flops"]


def test_a_wrong_result_is_no_figure() -> None:
    site = dry("neighbourhood", "fp32")
    row = gpu_rows.row_of(site, "cpu", None)
    exact = row.exact()
    shifted = gpu.figures("unfold", row, lambda: lambda: exact.roll(1, -1).float(), exact, Clock(dry=True))
    unwritten = gpu.figures("unfold", row, lambda: lambda: torch.full_like(exact, torch.nan), exact, Clock(dry=True))
    assert shifted["failed"].startswith("off by ")
    assert unwritten["failed"] == "off by nan of the largest result"


def test_no_result_that_was_right_before_is_left_in_memory() -> None:
    site = dry("neighbourhood", "fp32")
    row = gpu_rows.row_of(site, "cpu", None)
    exact = row.exact()
    kept = torch.cat([exact, exact]).float()  # larger than what it is compared with
    found = gpu.figures("unfold", row, lambda: lambda: kept, exact, Clock(dry=True))
    assert found["failed"] == "off by nan of the largest result"


def test_a_contestant_that_fails_says_why() -> None:
    def missing() -> Any:
        raise gpu_rows.Missing("no natten here")

    def broken() -> Any:
        raise RuntimeError("a shape it does not like\nand more")

    row = gpu_rows.row_of(dry("neighbourhood", "fp32"), "cpu", None)
    exact, clock = row.exact(), Clock(dry=True)
    assert gpu.figures("natten", row, missing, exact, clock) == {"failed": "no natten here"}
    assert gpu.figures("natten", row, broken, exact, clock) == {"failed": "RuntimeError: a shape it does not like"}


ROW = {
    "level": "op",
    "name": "64 windows of 49, head_dim 32",
    "dtype": "fp16",
    "moved": 3_000_000,
    "flops": 1.0,
    "results": {
        "naive": {"median_ms": 0.3, "error": 1e-4, "peak_mb": 9.0},
        "flex": {"failed": "no kernel for it"},
        "attnrewrite": {"median_ms": 0.002, "error": 1e-4, "peak_mb": 1.0},
    },
}


def test_tables_have_shares_gains_and_reasons() -> None:
    machine = {"device": "GPU", "torch": "2", "cuda": "13"}
    text = gpu.markdown({"machine": machine, "copy_bandwidth": 3e12, "rows": [ROW]})
    assert "| 64 windows of 49, head_dim 32 | fp16 | 0.300 |  | 0.002 | 50% | 150.00 | 1 |" in text
    assert "* flex: no kernel for it (64 windows of 49, head_dim 32, fp16, 1 rows)" in text


def test_a_row_measured_again_takes_the_place_of_the_first() -> None:
    document: Any = {"rows": [dict(ROW), {**ROW, "dtype": "fp32"}]}
    gpu.add(document, {**ROW, "moved": 7})
    gpu.add(document, {**ROW, "name": "another"})
    assert [(row["name"][:2], row["dtype"], row["moved"]) for row in document["rows"]] == [
        ("64", "fp16", 7),
        ("64", "fp32", 3_000_000),
        ("an", "fp16", 3_000_000),
    ]


def test_a_dry_run_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    gpu.main(["--dry-run", "--only", "neighbourhood", "--rows", "fp32", "--json", str(file)])
    assert "### neighbourhood" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert "median_ms" not in row["results"]["attnrewrite"]
    gpu.main(["--print", str(file)])
    assert "| k 3, 8x8x12, batch 1 | fp32 |" in capsys.readouterr().out


def test_weights_of_models_have_few_numbers_and_come_back(tmp_path: Path) -> None:
    site = gpu_rows.ModelSite("unfold_k3_8", 1, "fp16")
    first, again = site.module(), site.module()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert len(parameter.unique()) <= 4, name
        assert torch.equal(parameter.half().float(), parameter), name
    folder = tmp_path / gpu.MODELS / site.folder
    folder.mkdir(parents=True)
    (folder / "weights.bin.xz").write_bytes(lzma.compress(b"weights"))
    gpu.unpack(tmp_path)
    assert (folder / "weights.bin").read_bytes() == b"weights"


@pytest.mark.parametrize("arguments", [["--only", "ops"], ["--only", "op"]])
def test_what_cannot_be_run_is_one_sentence(arguments: list[str]) -> None:
    if torch.cuda.is_available() and arguments[1] == "op":
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit, match=r"there is no (level 'ops'|CUDA device here)"):
        gpu.main(arguments)
