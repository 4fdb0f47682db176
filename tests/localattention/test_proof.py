"""The proof accepts what the passes write and nothing that was changed afterwards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from attnrewrite.frontend.onnx import read
from attnrewrite.functions import operands_of
from attnrewrite.graph import Graph, Node
from attnrewrite.pipeline import select
from attnrewrite.verify.exact import verify_exact
from tests.models.onnx_spellings import SPELLINGS
from tests.passes.rewritten import local_ops

Change = Callable[[Node], None]


def rewritten(name: str) -> Graph:
    return select().run(read(SPELLINGS[name].model())).graph


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_the_passes_write_is_proved(name: str) -> None:
    (check,) = verify_exact(read(SPELLINGS[name].model()), rewritten(name))
    assert check.passed, check.detail


def attribute(name: str, value: object) -> Change:
    return lambda node: node.attributes.update({name: value})


def constant(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(node: Node) -> None:
        value = operands_of(node)[name]
        value.set_constant(np.ascontiguousarray(change(value.constant)))

    return apply


def one_changed(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[array.size // 2] += 0.01
    return array


CHANGES: dict[str, tuple[str, Change]] = {
    "shift": ("window-shifted", attribute("shift_size", [2, 1])),
    "no-shift": ("window-shifted", attribute("shift_size", [0, 0])),
    "window": ("window-unshifted", attribute("window_size", [8, 2])),
    "window-turned": ("window-rectangular-window", attribute("window_size", [2, 6])),
    "pad-first": ("window-shift-then-pad", attribute("shift_padded", 1)),
    "shift-first": ("window-pad-then-shift", attribute("shift_padded", 0)),
    "penalty": ("window-shifted", attribute("mask_value", -99.0)),
    "penalty-excludes": ("window-shifted", attribute("mask_value", -np.inf)),
    "no-penalty": ("window-shifted", lambda node: node.attributes.pop("mask_value")),
    "bias-element": ("window-shifted", constant("bias", one_changed)),
    "bias-of-other-heads": ("window-shifted", constant("bias", lambda b: np.roll(b, 1, axis=1))),
    "bias-transposed": ("window-shifted", constant("bias", lambda b: b.swapaxes(2, 3))),
    "mask-element": ("window-mask-almost-shift", constant("mask", one_changed)),
    "kernel": ("neighborhood-k3-by-5", attribute("kernel_size", [5, 3])),
    "dilation": ("neighborhood-slices", attribute("dilation", [2, 1])),
    "slot-bias-element": ("neighborhood-bias", constant("bias", one_changed)),
    "slot-bias-turned": ("neighborhood-bias", constant("bias", lambda b: b[:, ::-1])),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_was_changed_is_not_proved(case: str) -> None:
    name, change = CHANGES[case]
    graph = rewritten(name)
    (node,) = local_ops(graph)
    change(node)
    (check,) = verify_exact(read(SPELLINGS[name].model()), graph)
    assert not check.passed
    assert check.detail


def test_an_op_of_another_model_is_not_proved() -> None:
    (check,) = verify_exact(read(SPELLINGS["window-unshifted"].model()), rewritten("neighborhood-slices"))
    assert not check.passed
