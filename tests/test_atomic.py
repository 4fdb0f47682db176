"""An output directory appears whole or not at all, and nobody else's files are lost."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from attnrewrite.atomic import GENERATOR, staged_directory
from attnrewrite.errors import UserError

MARKER = "report.json"


def write(stage: Path, **files: str) -> None:
    for name, text in files.items():
        (stage / name).write_text(text)
    (stage / MARKER).write_text(json.dumps({"generator": GENERATOR, "files": sorted(files)}))


def contents(directory: Path) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file() and p.name != MARKER
    }


def test_directory_appears_at_the_end(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with staged_directory(out, MARKER) as stage:
        write(stage, model="new")
        assert not out.exists()
    assert contents(out) == {"model": "new"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_a_failure(tmp_path, error):
    with pytest.raises(error), staged_directory(tmp_path / "a" / "b" / "out", MARKER) as stage:
        write(stage, model="new")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_said_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="out: No space left on device"), staged_directory(tmp_path / "out", MARKER):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_earlier_output_is_replaced_whole_and_foreign_files_stay(tmp_path):
    out = tmp_path / "out"
    with staged_directory(out, MARKER) as stage:
        write(stage, model="old", library="old")
    (out / "notes.txt").write_text("mine")
    (out / "mine").mkdir()
    (out / "mine" / "deep.txt").write_text("deep")
    with staged_directory(out, MARKER) as stage:
        write(stage, model="new")
    assert contents(out) == {"model": "new", "notes.txt": "mine", "mine/deep.txt": "deep"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_earlier_output_survives_a_failure(tmp_path):
    out = tmp_path / "out"
    with staged_directory(out, MARKER) as stage:
        write(stage, model="old")
    with pytest.raises(ValueError), staged_directory(out, MARKER) as stage:
        write(stage, model="new")
        raise ValueError
    assert contents(out) == {"model": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_foreign_file_in_the_way_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with staged_directory(out, MARKER) as stage:
        write(stage, model="old")
    (out / "library").write_text("mine")
    with pytest.raises(UserError, match="its library is not of an earlier run"), staged_directory(out, MARKER) as stage:
        write(stage, model="new", library="new")
    assert contents(out) == {"model": "old", "library": "mine"}


def test_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with staged_directory(tmp_path / "out", MARKER) as stage:
        write(stage, model="new")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "real") == {"model": "new"}


def foreign_directory(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.jpg").write_text("precious")
    return tmp_path / "out"


def foreign_report(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text('{"generator": "another tool", "files": []}')
    return tmp_path / "out"


def plain_file(tmp_path: Path) -> Path:
    (tmp_path / "out").write_text("a file")
    return tmp_path / "out"


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("a file")
    return tmp_path / "file" / "out"


def dangling_link(tmp_path: Path) -> Path:
    (tmp_path / "out").symlink_to("nowhere")
    return tmp_path / "out"


REFUSED = {
    foreign_directory: "it is not empty and holds no report.json of an earlier run",
    foreign_report: "it is not empty and holds no report.json of an earlier run",
    plain_file: "it exists and is not a directory",
    below_a_file: "cannot write",
    dangling_link: "it is a link to nowhere",
}


@pytest.mark.parametrize("place", REFUSED, ids=lambda place: place.__name__)
def test_destination_that_is_not_ours_is_refused(tmp_path, place):
    destination = place(tmp_path)
    before = {p: p.is_file() and p.read_text() for p in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=REFUSED[place]), staged_directory(destination, MARKER):
        pytest.fail("the block must not run")
    assert {p: p.is_file() and p.read_text() for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("inside", ["model.onnx", "deep/model.onnx", "."])
def test_inputs_are_not_overwritten(tmp_path, inside):
    out = tmp_path / "out"
    with staged_directory(out, MARKER) as stage:
        write(stage, model="old")
    with pytest.raises(UserError, match="would overwrite the input"), staged_directory(out, MARKER, (out / inside,)):
        pytest.fail("the block must not run")
