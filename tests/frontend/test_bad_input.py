"""Whatever is wrong with a model or the shapes asked for: a UserError, one sentence that names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from attnrewrite.errors import UserError
from attnrewrite.frontend.onnx import read, write
from tests import tiny
from tests.models.onnx_builder import Builder

Make = Callable[[Path], None]


def external(path: Path) -> Path:
    onnx.save(tiny.linear(channels=64), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path.with_name("weights.bin")


def undefined_value(path: Path) -> None:
    model = tiny.linear()
    model.graph.node[0].input[0] = "nowhere"
    path.write_bytes(model.SerializeToString())


BAD_FILES: dict[str, tuple[Make, str]] = {
    "missing": (lambda p: None, "{path} does not exist"),
    "directory": (lambda p: p.mkdir(), "{path} is a directory, not an ONNX file"),
    "image": (
        lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256))),  # type: ignore[arg-type,return-value]
        "{path} is not an ONNX file, or it is truncated",
    ),
    "empty": (lambda p: p.touch(), "{path} is not an ONNX file, or it is truncated: it holds no graph"),
    "a-tensor-only": (
        lambda p: onnx.save_tensor(onnx.numpy_helper.from_array(np.zeros(100)), p),
        "{path} is not an ONNX file, or it is truncated",
    ),
    "weights-missing": (
        lambda p: external(p).unlink(),
        "{path} keeps weight in weights.bin, which is missing",
    ),
    "weights-truncated": (
        lambda p: external(p).write_bytes(b"short"),  # type: ignore[arg-type,return-value]
        "{path} keeps weight in weights.bin, which is truncated: 16384 bytes expected",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    make, sentence = BAD_FILES[case]
    path = tmp_path / "model.onnx"
    make(path)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(sentence.format(path=path))
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    whole = tiny.linear().SerializeToString()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"^{re.escape(str(path))} is not an ONNX file, or it is truncated"):
            read(path)


def test_a_node_that_reads_nothing_that_exists_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    undefined_value(path)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is not a valid ONNX model: .*nowhere"):
        read(path)


def test_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out\.onnx cannot be written: No such file or directory$"):
        write(read(tiny.linear()), tmp_path / "nowhere" / "out.onnx")


def relu() -> onnx.ModelProto:
    g = Builder()
    return g.model({"y": g.op("Add", g.input("x", ["B", 3, "S", "S"]), g.input("z", ["B", 1, 1, 1]))})


BAD_SHAPES: dict[str, tuple[dict[str, tuple[int | str, ...]], str]] = {
    "no-such-input": ({"pixels": (1, 3, 8, 8)}, "the model has no input named pixels; its inputs are x, z"),
    "rank": ({"x": (1, 3, 8)}, "input x has shape Bx3xSxS, which 1x3x8 does not fit"),
    "fixed-extent": ({"x": (1, 4, 8, 8)}, "input x has shape Bx3xSxS, which 1x4x8x8 does not fit"),
    "fixed-extent-renamed": ({"x": (1, "C", 8, 8)}, "input x has shape Bx3xSxS, which 1xCx8x8 does not fit"),
    "one-symbol-two-values": ({"x": (1, 3, 8, 9)}, "input shapes give S two values: 8 and 9"),
    "two-inputs-two-values": ({"x": (1, 3, 8, 8), "z": (2, 1, 1, 1)}, "input shapes give B two values: 1 and 2"),
    "negative": ({"x": (-1, 3, 8, 8)}, "input x has shape Bx3xSxS, which -1x3x8x8 does not fit"),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_bad_input_shapes(case: str) -> None:
    shapes, sentence = BAD_SHAPES[case]
    with pytest.raises(UserError) as caught:
        read(relu(), shapes)
    assert str(caught.value) == sentence
