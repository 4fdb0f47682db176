"""Originals in which an op stands already: the same op passes, another one does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnrewrite.frontend.onnx import read
from attnrewrite.verify.exact import verify_exact
from tests.functions.test_bodies import PLAIN, SHIFTED, Case

ORIGINAL = Case(SHIFTED, ("bias",))
OTHERS = {
    "another shift": replace(ORIGINAL, spec=PLAIN),
    "another scale": replace(ORIGINAL, spec=replace(SHIFTED, scale=2.0)),
    "another operand": replace(ORIGINAL, optional=("mask",)),
    "another batch": replace(ORIGINAL, batch=3),
}


def test_the_same_op_stands_for_itself() -> None:
    (check,) = verify_exact(read(ORIGINAL.model()), read(ORIGINAL.model()))
    assert check.passed and check.detail == "the original has this op"


@pytest.mark.parametrize("name", OTHERS)
def test_another_op_does_not(name: str) -> None:
    (check,) = verify_exact(read(ORIGINAL.model()), read(OTHERS[name].model()))
    assert not check.passed and "another op, or one of other operands" in check.detail
