"""If, Loop and Scan bodies go from file to file as they are; what they capture keeps its name and its meaning. An If
whose condition is known becomes the branch it takes.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.graph import Graph, Node, Value
from tests.running import run

node = helper.make_node
X = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)


def info(name: str, shape: list[int] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weights_of(**arrays: object) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]


def branch(name: str, nodes: list[onnx.NodeProto], **weights: object) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [info(nodes[-1].output[0], [2, 3])], weights_of(**weights))


def model_of(nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("y",), **weights: object) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [info("x", [2, 3]), info("flag", [], TensorProto.BOOL)],
        [info(o, [2, 3]) for o in outputs],
        weights_of(**weights),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


TWO = np.full((1, 3), 2, np.float32)


def if_of(then: onnx.GraphProto, orelse: onnx.GraphProto, output: str = "y") -> onnx.NodeProto:
    return node("If", ["flag"], [output], then_branch=then, else_branch=orelse)


def captured_results() -> onnx.ModelProto:
    return model_of(
        [
            node("Exp", ["x"], ["e"]),
            node("Neg", ["e"], ["n"]),
            if_of(branch("then", [node("Add", ["e", "n"], ["a"])]), branch("else", [node("Mul", ["e", "e"], ["m"])])),
        ]
    )


def captured_do_nothing() -> onnx.ModelProto:
    """The captured value is an Identity of another, which folding would see through."""
    return model_of(
        [
            node("Exp", ["x"], ["e"]),
            node("Identity", ["e"], ["same"]),
            node("Neg", ["same"], ["n"]),
            if_of(branch("then", [node("Abs", ["same"], ["a"])]), branch("else", [node("Identity", ["n"], ["b"])])),
        ]
    )


def captured_constants() -> onnx.ModelProto:
    """An initializer and a result that folds to a constant, read by nobody but the bodies."""
    return model_of(
        [
            node("Mul", ["w", "w"], ["squared"]),
            if_of(
                branch("then", [node("Add", ["x", "w"], ["a"])]), branch("else", [node("Add", ["x", "squared"], ["b"])])
            ),
        ],
        w=TWO,
    )


def captured_input() -> onnx.ModelProto:
    return model_of([if_of(branch("then", [node("Abs", ["x"], ["a"])]), branch("else", [node("Neg", ["x"], ["b"])]))])


def own_initializers_of_one_name() -> onnx.ModelProto:
    """Both bodies hold a `w` of their own, and they differ."""
    return model_of(
        [
            if_of(
                branch("then", [node("Add", ["x", "w"], ["a"])], w=TWO),
                branch("else", [node("Add", ["x", "w"], ["b"])], w=3 * TWO),
            )
        ]
    )


def constant_nodes_in_bodies() -> onnx.ModelProto:
    constant = node("Constant", [], ["c"], value=numpy_helper.from_array(TWO))
    return model_of(
        [
            if_of(
                branch("then", [constant, node("Add", ["x", "c"], ["a"])]),
                branch("else", [node("Sub", ["x", "x"], ["b"])]),
            )
        ]
    )


def nested() -> onnx.ModelProto:
    inner = if_of(branch("t", [node("Add", ["e", "w"], ["p"])]), branch("f", [node("Sub", ["e", "v"], ["q"])]), "r")
    return model_of(
        [
            node("Exp", ["x"], ["e"]),
            if_of(
                branch("then", [inner, node("Neg", ["r"], ["a"])], v=TWO), branch("else", [node("Abs", ["e"], ["b"])])
            ),
        ],
        w=TWO,
    )


def loop() -> onnx.ModelProto:
    """x <- x * e + w, three times; e and w are captured."""
    body = helper.make_graph(
        [node("Mul", ["s", "e"], ["m"]), node("Add", ["m", "w"], ["next"]), node("Identity", ["go"], ["on"])],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("s", [2, 3])],
        [info("on", [], TensorProto.BOOL), info("next", [2, 3])],
    )
    return model_of(
        [node("Sigmoid", ["x"], ["e"]), node("Loop", ["n", "", "x"], ["y"], body=body)], w=TWO, n=np.array(3)
    )


def scan() -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Add", ["sum", "row"], ["next"]), node("Mul", ["next", "e"], ["out"])],
        "body",
        [info("sum", [3]), info("row", [3])],
        [info("next", [3]), info("out", [3])],
    )
    return model_of(
        [
            node("Mul", ["w", "w"], ["e"]),
            node("Scan", ["zero", "x"], ["last", "y"], body=body, num_scan_inputs=1),
        ],
        w=np.float32([1, 2, 3]),
        zero=np.zeros(3, np.float32),
    )


MODELS = {
    f.__name__.replace("_", "-"): f
    for f in (
        captured_results,
        captured_do_nothing,
        captured_constants,
        captured_input,
        own_initializers_of_one_name,
        constant_nodes_in_bodies,
        nested,
        loop,
        scan,
    )
}


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_bodies_keep_their_function(name: str, taken: bool) -> None:
    original = MODELS[name]()
    written = to_model(read(MODELS[name]()))
    onnx.checker.check_model(written)
    names = [t.name for t in written.graph.initializer]
    assert len(names) == len(set(names))
    inputs = {"x": X, "flag": np.array(taken)}
    np.testing.assert_array_equal(run(written, inputs)["y"], run(original, inputs)["y"])


def with_known_flag(model: onnx.ModelProto, flag: bool) -> onnx.ModelProto:
    """The model whose condition is a constant, under a Not, so that it is known after folding only."""
    known = onnx.ModelProto()
    known.CopyFrom(model)
    del known.graph.input[1]
    known.graph.initializer.append(numpy_helper.from_array(np.array([not flag]), "unflag"))
    known.graph.node.insert(0, node("Not", ["unflag"], ["flag"]))
    return known


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("loop", "scan")])
def test_a_known_condition_leaves_the_branch_it_takes(name: str, taken: bool) -> None:
    graph = read(with_known_flag(MODELS[name](), taken))
    assert not [n for n in graph.nodes if n.op == "If"]
    written = to_model(graph)
    onnx.checker.check_model(written, full_check=True)
    expected = run(MODELS[name](), {"x": X, "flag": np.array(taken)})["y"]
    np.testing.assert_array_equal(run(written, {"x": X})["y"], expected)


def test_branches_of_one_if_after_another_keep_their_names_apart() -> None:
    """Both Ifs name alike what their branches compute."""
    first = if_of(branch("then", [node("Abs", ["x"], ["a"])]), branch("else", [node("Neg", ["x"], ["b"])]), "h")
    inner = branch("then", [node("Exp", ["h"], ["e"]), node("Add", ["e", "h"], ["a"])])
    second = node("If", ["other"], ["y"], then_branch=inner, else_branch=branch("else", [node("Exp", ["h"], ["b"])]))
    model = model_of([node("Not", ["flag"], ["other"]), first, second])
    expected = run(model, {"x": X, "flag": np.array(False)})["y"]
    graph = read(with_known_flag(model, False))
    np.testing.assert_array_equal(run(to_model(graph), {"x": X})["y"], expected)
    assert [n.op for n in graph.nodes] == ["Neg", "Exp", "Add", "Identity"]


def test_a_taken_branch_leaves_their_names_to_the_branches_that_stay() -> None:
    """The second If, of unknown condition, has an `a` and a weight `w` of its own, as the first one does."""
    first = if_of(
        branch("then", [node("Add", ["x", "w"], ["a"])], w=TWO), branch("else", [node("Neg", ["x"], ["b"])]), "h"
    )
    total = [node("ReduceSum", ["x"], ["s"], keepdims=0), node("Greater", ["s", "zero"], ["positive"])]
    bodies = [branch(n, [node(op, ["h", "w"], ["a"])], w=3 * TWO) for n, op in (("then", "Mul"), ("else", "Sub"))]
    second = node("If", ["positive"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    model = model_of([first, *total, second], zero=np.float32(0))
    expected = run(model, {"x": X, "flag": np.array(True)})["y"]
    graph = read(with_known_flag(model, True))
    assert [n.op for n in graph.nodes].count("If") == 1
    np.testing.assert_array_equal(run(to_model(graph), {"x": X})["y"], expected)
    outer = {o.name for n in graph.nodes for o in n.outputs}
    for body in next(n for n in graph.nodes if n.op == "If").attributes.values():
        assert outer.isdisjoint(o.name for n in body.nodes for o in n.outputs)


def test_an_unknown_if_inside_a_taken_branch_stays() -> None:
    """Its own branches read what the taken one computes, under the name it has now."""
    inner = node(
        "If",
        ["positive"],
        ["d"],
        then_branch=branch("then", [node("Add", ["e", "c"], ["a"])]),
        else_branch=branch("else", [node("Mul", ["e", "c"], ["m"])]),
    )
    total = [node("ReduceSum", ["c"], ["s"], keepdims=0), node("Greater", ["s", "zero"], ["positive"])]
    taken = branch("outer", [node("Abs", ["x"], ["c"]), *total, inner, node("Add", ["d", "c"], ["r"])])
    other = branch("other", [node("Neg", ["e"], ["n"])])
    model = model_of(
        [node("Exp", ["x"], ["e"]), if_of(taken, other, "h"), node("Sub", ["h", "e"], ["y"])], zero=np.float32(0)
    )
    expected = run(model, {"x": X, "flag": np.array(True)})["y"]
    graph = read(with_known_flag(model, True))
    assert [n.op for n in graph.nodes].count("If") == 1
    np.testing.assert_array_equal(run(to_model(graph), {"x": X})["y"], expected)


def test_a_body_keeps_its_own_initializers_to_itself() -> None:
    assert not to_model(read(own_initializers_of_one_name())).graph.initializer


def test_a_captured_value_is_a_use() -> None:
    graph = read(captured_results())
    (exp,) = (n for n in graph.nodes if n.op == "Exp")
    assert [n.op for n in graph.users()[exp.output]] == ["Neg", "If"]


def replace_exp(graph: Graph) -> None:
    """Exp(x) -> Exp(Abs(x)), by a node of another name: what a pass does to a captured value."""
    (exp,) = (n for n in graph.nodes if n.op == "Exp")
    inner = Value("inner", exp.output.shape, exp.output.dtype)
    new = Value(graph.fresh_name("new"), exp.output.shape, exp.output.dtype)
    graph.insert_before(exp, [Node("Abs", [exp.required(0)], [inner]), Node("Exp", [inner], [new])])
    graph.replace_uses(exp.output, new)
    graph.remove_dead()
    graph.sort()


@pytest.mark.parametrize("taken", [True, False])
def test_a_body_reads_what_replaced_the_value_it_captures(taken: bool) -> None:
    graph = read(captured_results())
    replace_exp(graph)
    written = to_model(graph)
    onnx.checker.check_model(written)
    found = run(written, {"x": X, "flag": np.array(taken)})["y"]
    expected = run(captured_results(), {"x": np.abs(X), "flag": np.array(taken)})["y"]
    np.testing.assert_array_equal(found, expected)
