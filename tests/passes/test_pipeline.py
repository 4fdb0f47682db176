"""Passes as data: chosen by name, in an order that is checked, and stopped where one breaks the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnrewrite.dims import SymbolicExtent
from attnrewrite.errors import PassError, UserError
from attnrewrite.facts import Facts
from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.graph import Graph, Node, UnknownShape, Value
from attnrewrite.indexing.map import IndexingError
from attnrewrite.localattention.site import Decline
from attnrewrite.pipeline import PASSES, Declined, Pass, Pipeline, check, select
from tests.models.onnx_builder import Builder
from tests.models.onnx_spellings import NEIGHBORHOOD, SPELLINGS, UNSHIFTED, WINDOW, sample_input
from tests.models.onnx_windows import CHANNELS
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

NAMES = [
    "fold-reparam-branches",
    "move-folds",
    "move-pools",
    "part-joined-tokens",
    "move-partitions",
    "move-merges",
    "fuse-window-attention",
    "unfold-to-slide-attention",
    "fuse-outlook-attention",
]


def test_the_passes_have_names_with_dashes() -> None:
    assert list(PASSES) == NAMES
    assert all(name == pass_.name for name, pass_ in PASSES.items())
    assert select().names == tuple(PASSES)


def test_passes_are_chosen_by_name() -> None:
    slide = SPELLINGS["neighborhood-slide-two-convolutions"].model
    assert [s.verdict for s in optimize(slide(), ["fuse-window-attention"]).sites] == ["leave"]
    assert [s.verdict for s in optimize(slide(), ["unfold-to-slide-attention"]).sites] == ["leave"]
    both = optimize(slide(), ["fold-reparam-branches", "unfold-to-slide-attention"])
    assert [s.verdict for s in both.sites] == ["rewrite"]
    assert list(both.seconds) == list(both.rewrites) == ["fold-reparam-branches", "unfold-to-slide-attention"]
    assert both.rewrites == {"fold-reparam-branches": 2, "unfold-to-slide-attention": 1}


def test_without_a_pass_for_them_softmaxes_are_sites_all_the_same() -> None:
    outcome = optimize(WINDOW.model(), ["fold-reparam-branches"])
    (site,) = outcome.sites
    assert (site.verdict, site.kind, site.reason) == ("leave", "other", "no pass of this run looks at softmaxes")
    assert optimize(WINDOW.model(), []).sites == (site,)


def test_an_unknown_pass_is_bad_usage() -> None:
    with pytest.raises(
        UserError, match=r"^there is no pass named fuse-windows; the passes are fold-reparam-branches, "
    ):
        select(["fuse-windows"])


def test_a_pass_before_the_one_it_follows_is_bad_usage() -> None:
    with pytest.raises(UserError, match=r"^the pass unfold-to-slide-attention must run after fold-reparam-branches$"):
        select(["unfold-to-slide-attention", "fold-reparam-branches"])


def test_each_pass_is_seen_as_it_ends() -> None:
    seen: list[tuple[str, int]] = []
    graph = read(WINDOW.model())
    outcome = select().run(graph, lambda name, graph: seen.append((name, len(local_ops(graph)))))
    before = NAMES.index("fuse-window-attention")
    assert seen == [(name, int(position >= before)) for position, name in enumerate(NAMES)]
    assert outcome.nodes_before > outcome.nodes_after == len(graph.nodes)
    assert outcome.graph is graph


# Passes that go wrong.


def relu_model() -> onnx.ModelProto:
    g = Builder()
    return g.model({"y": g.op("Exp", g.op("Relu", g.input("x", [3])))})


def on_relu(rewrite: Callable[[Facts, Node], None], name: str = "break-it") -> Pass:
    return Pass(name, lambda facts, node: node if node.op == "Relu" else None, rewrite)


def reads_a_stranger(facts: Facts, node: Node) -> None:
    node.inputs[0] = Value("nobody", (3,), np.dtype(np.float32))


def takes_a_name(facts: Facts, node: Node) -> None:
    new = Value(facts.users(node.output)[0].output.name, (3,), np.dtype(np.float32))
    facts.graph.nodes.append(Node("Abs", [node.required(0)], [new]))
    facts.users(node.output)[0].inputs[0] = new


def drops_the_output(facts: Facts, node: Node) -> None:
    facts.graph.outputs = [Value("nothing", (3,), np.dtype(np.float32))]


@pytest.mark.parametrize(
    ("rewrite", "what"),
    [
        (reads_a_stranger, "relu0_0 reads nobody, which nothing computes before it"),
        (takes_a_name, "two values are named exp1_0"),
        (drops_the_output, "the output nothing is computed by nothing"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_named(rewrite: Any, what: str) -> None:
    pipeline = Pipeline([PASSES["fold-reparam-branches"], on_relu(rewrite)])
    with pytest.raises(PassError) as caught:
        pipeline.run(read(relu_model()))
    sentence = f"the pass break-it left the graph invalid: {what} (passes before it: fold-reparam-branches)"
    assert str(caught.value) == sentence


def test_a_rewrite_that_declines_leaves_the_graph() -> None:
    def decline(facts: Facts, node: Node) -> None:
        raise Declined(Decline("not today", node.label))

    said = []

    def record(node: Node, found: Node | Decline) -> None:
        said.append(found)

    graph = read(relu_model())
    before = str(graph)
    outcome = Pipeline([Pass("p", lambda f, n: n if n.op == "Relu" else None, decline, record)]).run(graph)
    assert (str(graph), outcome.modified, said) == (before, False, [Decline("not today", "relu0_0")])


def test_a_cycle_is_no_graph() -> None:
    x = Value("x", (3,), np.dtype(np.float32))
    a, b = Value("a", (3,), np.dtype(np.float32)), Value("b", (3,), np.dtype(np.float32))
    graph = Graph([x], [b], [Node("Add", [x, b], [a]), Node("Neg", [a], [b])], 17)
    with pytest.raises(ValueError, match=r"^Add -> a reads b, which nothing computes before it$"):
        check(graph)


# What lies around a site.


def test_softmaxes_of_one_name_are_sites_of_their_own() -> None:
    """Two blocks, one to be rewritten and one not, whose softmaxes are both named `softmax`."""
    g = Builder()
    x = g.input("x", WINDOW.shape(2))
    inner = WINDOW.block(g, x)
    logits = g.op("MatMul", g.reshape(inner, 2, 96, CHANNELS), g.transpose(g.reshape(inner, 2, 96, CHANNELS), 0, 2, 1))
    model = g.model({"y": g.op("Softmax", logits, axis=-1)})
    for node in model.graph.node:
        node.name = "softmax" if node.op_type == "Softmax" else node.name
    outcome = optimize(model)
    assert [(s.id, s.node, s.verdict) for s in outcome.sites] == [
        ("site0", "softmax", "rewrite"),
        ("site1", "softmax", "leave"),
    ]


def test_blocks_in_a_row_are_rewritten_one_by_one() -> None:
    g = Builder()
    x = g.input("x", WINDOW.shape("batch"))
    model = g.model({"y": WINDOW.block(g, UNSHIFTED.block(g, x))})
    outcome = optimize(model)
    assert [s.shift_size for s in outcome.sites] == [(0, 0), (2, 2)]
    assert not left_over(outcome.graph)
    inputs = sample_input(WINDOW)
    expected = WINDOW.evaluate(UNSHIFTED.evaluate(inputs["x"]))
    assert error(run(written(outcome), inputs)["y"], expected) <= 1e-5


def test_the_map_that_a_site_returns_may_have_other_readers_and_leave_the_model() -> None:
    g = Builder()
    x = g.input("x", WINDOW.shape(2))
    block = WINDOW.block(g, x)
    model = g.model({"y": g.op("Relu", block), "z": g.op("Neg", block), "block": block})
    outcome = optimize(model)
    inputs = sample_input(WINDOW)
    expected = run(model, inputs)
    found = run(written(outcome), inputs)
    assert [s.verdict for s in outcome.sites] == ["rewrite"]
    assert list(found) == ["y", "z", "block"]
    for name in expected:
        assert error(found[name], expected[name]) <= 5e-6


@pytest.mark.parametrize("taken", [True, False])
def test_a_site_is_rewritten_around_a_body_that_reads_its_maps(taken: bool) -> None:
    """An If captures the map before the block and the block's result: both keep their names and their numbers."""
    g = Builder()
    x = g.op("Tanh", g.input("x", WINDOW.shape(2)))
    merged = WINDOW.block(g, x)
    shape = [2, 8, 12, CHANNELS]
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, [x, merged], [f"out_{name}"])],
            name,
            [],
            [helper.make_tensor_value_info(f"out_{name}", TensorProto.FLOAT, shape)],
        )
        for name, op in (("then", "Add"), ("else", "Sub"))
    }
    g.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    g.nodes.append(
        helper.make_node("If", ["flag"], ["chosen"], then_branch=branches["then"], else_branch=branches["else"])
    )
    model = g.model({"y": "chosen"})
    outcome = optimize(model)
    assert [s.verdict for s in outcome.sites] == ["rewrite"]
    result = written(outcome)
    onnx.checker.check_model(result)
    inputs = sample_input(WINDOW) | {"flag": np.array(taken)}
    assert error(run(result, inputs)["y"], run(model, inputs)["y"]) <= 5e-6


@pytest.mark.parametrize("taken", [True, False])
def test_what_a_body_reads_from_inside_a_site_stays(taken: bool) -> None:
    """The probabilities are captured: then they must exist, and the site is left alone."""
    model = WINDOW.model()
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    shape = [12, 3, 16, 16]
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, [softmax.output[0]], [f"out_{name}"])],
            name,
            [],
            [helper.make_tensor_value_info(f"out_{name}", TensorProto.FLOAT, shape)],
        )
        for name, op in (("then", "Abs"), ("else", "Neg"))
    }
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, shape))
    model.graph.node.append(
        helper.make_node("If", ["flag"], ["z"], then_branch=branches["then"], else_branch=branches["else"])
    )
    outcome = optimize(model)
    assert [s.verdict for s in outcome.sites] == ["leave"]
    inputs = sample_input(WINDOW) | {"flag": np.array(taken)}
    np.testing.assert_array_equal(run(written(outcome), inputs)["z"], run(model, inputs)["z"])


# Texts.


@pytest.mark.parametrize("name", ["window-shifted", "neighborhood-slide-two-convolutions"])
def test_golden_text(name: str, golden: Callable[[str, str], None]) -> None:
    """The graph before and after, as it prints itself."""
    graph = read(SPELLINGS[name].model())
    before = str(graph)
    select().run(graph)
    golden(f"{name}.txt", f"{before}\n\n\n{graph}\n")


def test_the_text_is_python() -> None:
    for spelling in (WINDOW, NEIGHBORHOOD):
        compile(str(optimize(spelling.model()).graph), "graph", "exec")


def test_sites_of_a_model_already_rewritten_are_its_ops() -> None:
    """The file as written is read back with its ops, and nothing is left to do."""
    outcome = optimize(WINDOW.model())
    again = read(to_model(outcome.graph))
    assert [n.attributes for n in local_ops(again)] == [n.attributes for n in local_ops(outcome.graph)]


@pytest.mark.parametrize(
    "error",
    [IndexingError("no rule"), UnknownShape("the shape of x is unknown"), SymbolicExtent("the extent n is symbolic")],
)
def test_what_a_match_cannot_read_is_the_reason(error: Exception) -> None:
    """A softmax is left with it; of any other node nothing is said."""

    def match(facts: Facts, node: Node) -> None:
        raise error

    g = Builder()
    x = g.op("Relu", g.input("x", [3, 4]))
    graph = read(g.model({"y": g.op("Softmax", x, axis=-1)}))
    (softmax,) = (n for n in graph.nodes if n.op == "Softmax")
    said: list[tuple[str, object]] = []
    told = Pass("told", match, lambda facts, found: None, lambda node, found: said.append((node.label, found)))
    outcome = Pipeline([told]).run(graph)
    assert not outcome.modified
    assert [(label, getattr(found, "reason", None)) for label, found in said] == [(softmax.label, str(error))]
