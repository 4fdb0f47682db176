"""Which constants of a rewritten graph follow from parameters, told by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import pytest

from attnrewrite.errors import UserError
from attnrewrite.facts import Facts
from attnrewrite.graph import Graph, Node, Value
from attnrewrite.localattention.site import Decline
from attnrewrite.pipeline import Outcome, Pass, Pipeline
from attnrewrite.trained import Gathered, rewrite_trained

Arrays = Mapping[str, np.ndarray]
PARAMETERS = {"table": np.zeros((5, 3), np.float32), "other": np.ones((4,), np.float32)}


def read(arrays: Arrays) -> Graph:
    """y = x * other, with the table held beside it."""
    x = Value("x", (4,), np.dtype(np.float32))
    held = {name: Value(name, a.shape, a.dtype, a) for name, a in arrays.items()}
    y = Value("y", (4,), np.dtype(np.float32))
    graph = Graph([x], [y], [Node("Mul", [x, held["other"]], [y], name="product")], 17)
    graph.source = list(held.values())
    return graph


def folding(make: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Pipeline:
    """One pass that hands the product a constant made of the parameters."""

    def match(facts: Facts, node: Node) -> Node | None:
        return node if node.op == "Mul" else None

    def rewrite(facts: Facts, node: Node) -> None:
        table, other = (v.constant for v in facts.graph.source)
        made = make(table, other)
        node.inputs[1] = Value("made", made.shape, made.dtype, made)

    return Pipeline([Pass("fold", match, rewrite)])


def run(make: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[Outcome, Gathered | None]:
    outcome, gathered = rewrite_trained(read, PARAMETERS, lambda graph: graph.source, folding(make))
    found = [g for value, g in gathered.items() if value.name == "made"]
    return outcome, found[0] if found else None


INDEX = np.array([3, 0, 14, 3])
GATHERS = {
    "elements": (lambda t, o: t.reshape(-1)[INDEX], ("table",), INDEX),
    "a row in another type": (lambda t, o: t[2].astype(np.float64), ("table",), np.array([6, 7, 8])),
    "the value itself": (lambda t, o: t, ("table",), None),
    "a transpose": (lambda t, o: t.T, ("table",), np.arange(15).reshape(5, 3).T),
    "of two": (lambda t, o: np.concatenate([t[0], o[:2]]), ("other", "table"), np.array([4, 5, 6, 0, 1])),
}


@pytest.mark.parametrize("name", GATHERS)
def test_gathers(name):
    make, sources, index = GATHERS[name]
    outcome, found = run(make)
    assert outcome.modified and found is not None
    assert tuple(v.name for v in found.values) == sources
    np.testing.assert_array_equal(found.index, index)


def test_elements_are_told_apart_by_few_bits():
    """What the model computes in bfloat16 from float32 parameters: two readings would leave some elements alike."""
    order = np.random.default_rng(0).permutation(4096)

    def narrow(arrays: Arrays) -> Graph:
        graph = read(arrays)
        wide, other = graph.source
        half = wide.constant.reshape(-1).astype(ml_dtypes.bfloat16)
        graph.source = [Value("half", half.shape, half.dtype, half), other]
        return graph

    parameters = PARAMETERS | {"table": np.zeros((64, 64), np.float32)}
    folded = folding(lambda t, o: t[order])
    _, gathered = rewrite_trained(narrow, parameters, lambda graph: graph.source, folded)
    (found,) = (g for value, g in gathered.items() if value.name == "made")
    np.testing.assert_array_equal(found.index, order)


def test_a_constant_of_no_parameter_stays_one():
    outcome, found = run(lambda t, o: np.arange(4, dtype=np.float32))
    assert outcome.modified and found is None


@pytest.mark.parametrize("make", [lambda t, o: t[0, :1] + o, lambda t, o: t[0] * 2, lambda t, o: np.append(t[0], 0)])
def test_what_is_no_gather_is_not_rewritten(make):
    seen = []

    def record(node, found):
        seen.append(found)

    (fold,) = folding(make).passes
    recording = Pipeline([Pass(fold.name, fold.match, fold.rewrite, record)])
    outcome, gathered = rewrite_trained(read, PARAMETERS, lambda graph: graph.source, recording)
    assert not outcome.modified
    assert [v.name for v in gathered] == ["other"]
    assert isinstance(seen[-1], Decline) and "still being trained" in seen[-1].reason


def test_a_rewrite_that_hangs_on_the_numbers_is_refused():
    def make(table: np.ndarray, other: np.ndarray) -> np.ndarray:
        return table[: 1 + int(other[0] > 0.5)]

    with pytest.raises(UserError, match="depends on the numbers"):
        run(make)
