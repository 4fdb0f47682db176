"""From file to file: what a model says besides its nodes, weights wherever they lie, element types, unusual outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnrewrite.frontend import onnx as frontend
from attnrewrite.frontend.onnx import read, to_model, write
from tests.models.build import SMALL, exported, references
from tests.models.onnx_builder import Builder
from tests.running import error, run

node = helper.make_node
X = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)


def info(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def small(outputs: tuple[str, ...] = ("y",), kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """y = relu(x W + b), W [64, 64]."""
    rng = np.random.default_rng(1)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = {"W": rng.normal(size=(64, 64)), "b": rng.normal(size=64)}
    nodes = [node("MatMul", ["x", "W"], ["m"]), node("Add", ["m", "b"], ["a"]), node("Relu", ["a"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "network",
        [info("x", ["batch", 64], kind)],
        [info(o, ["batch", 64], kind) for o in outputs],
        [numpy_helper.from_array(a.astype(dtype), n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def through_file(model: onnx.ModelProto, folder: Path, **options: object) -> Path:
    """model -> file -> graph -> file."""
    onnx.save(model, folder / "in.onnx", **options)  # type: ignore[arg-type]
    write(read(folder / "in.onnx"), folder / "out.onnx")
    return folder / "out.onnx"


def test_what_the_model_says_of_itself_is_kept(tmp_path: Path) -> None:
    model = small()
    model.doc_string, model.producer_name = "a network", "somebody"
    model.metadata_props.add(key="labels", value="a,b")
    written = onnx.load(through_file(model, tmp_path))
    assert (written.doc_string, written.producer_name, written.graph.name) == ("a network", "somebody", "network")
    assert {p.key: p.value for p in written.metadata_props} == {"labels": "a,b"}
    assert written.ir_version == 8
    (x,), (y,) = written.graph.input, written.graph.output
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["batch", 64]
    assert [d.dim_param or d.dim_value for d in y.type.tensor_type.shape.dim] == ["batch", 64]


def test_another_domain_stays_imported() -> None:
    model = small()
    model.graph.node[2].domain, model.graph.node[2].op_type = "com.example", "Strange"
    model.opset_import.append(helper.make_opsetid("com.example", 3))
    written = to_model(read(model))
    assert {i.domain: i.version for i in written.opset_import} == {"": 17, "com.example": 3}
    assert written.graph.node[2].domain == "com.example"


# Weights beside the model.


def external(folder: Path, **options: object) -> Path:
    """The small model with its weights in another file."""
    folder.mkdir(exist_ok=True)
    onnx.save(small(), folder / "m.onnx", save_as_external_data=True, size_threshold=0, **options)  # type: ignore[arg-type]
    assert any(
        t.data_location == TensorProto.EXTERNAL
        for t in onnx.load(folder / "m.onnx", load_external_data=False).graph.initializer
    )
    return folder / "m.onnx"


def external_weights(path: Path) -> list[str]:
    model = onnx.load(path, load_external_data=False)
    return [t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]


@pytest.mark.parametrize("one_file", [True, False])
def test_external_weights_are_read_from_beside_the_model_and_embedded(tmp_path: Path, one_file: bool) -> None:
    path = external(tmp_path / "in", all_tensors_to_one_file=one_file)
    expected = run(path, {"x": X})["y"]
    graph = read(path)
    for name in ("once.onnx", "twice.onnx"):  # writing leaves the graph as it was
        write(graph, tmp_path / name)
    shutil.rmtree(tmp_path / "in")
    for name in ("once.onnx", "twice.onnx"):
        assert not external_weights(tmp_path / name)
        np.testing.assert_array_equal(run(tmp_path / name, {"x": X})["y"], expected)


@pytest.mark.parametrize("from_external", [True, False])
def test_weights_beyond_the_limit_go_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_external: bool
) -> None:
    monkeypatch.setattr(frontend, "EXTERNAL_DATA_LIMIT_BYTES", 1000)
    monkeypatch.setattr(frontend, "LARGE_BYTES", 1000)
    path = external(tmp_path / "in") if from_external else tmp_path / "in.onnx"
    if not from_external:
        onnx.save(small(), path)
    expected = run(path, {"x": X})["y"]
    write(read(path), tmp_path / "out.onnx")
    # What is small is embedded, unless it lay beside the model before.
    assert external_weights(tmp_path / "out.onnx") == (["W", "b"] if from_external else ["W"])
    assert (tmp_path / "out.onnx.data").stat().st_size == 64 * 64 * 4 + from_external * 64 * 4
    if from_external:
        shutil.rmtree(tmp_path / "in")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", {"x": X})["y"], expected)


def test_external_weights_of_a_body_are_embedded(tmp_path: Path) -> None:
    def branch(name: str, factor: float) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.full((2, 64), factor, np.float32), f"w_{name}")
        return helper.make_graph(
            [node("Mul", ["x", weight.name], [f"o_{name}"])], name, [], [info(f"o_{name}", [2, 64])], [weight]
        )

    nodes = [node("If", ["flag"], ["y"], then_branch=branch("then", 2), else_branch=branch("else", 3))]
    graph = helper.make_graph(
        nodes, "g", [info("x", [2, 64]), info("flag", [], TensorProto.BOOL)], [info("y", [2, 64])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "in").mkdir()
    for branch_ in (a.g for a in model.graph.node[0].attribute):
        weight = branch_.initializer[0]
        (tmp_path / "in" / weight.name).write_bytes(weight.raw_data)
        onnx.external_data_helper.set_external_data(weight, weight.name, 0, len(weight.raw_data))
        weight.ClearField("raw_data")
    (tmp_path / "in" / "m.onnx").write_bytes(model.SerializeToString())
    write(read(tmp_path / "in" / "m.onnx"), tmp_path / "out.onnx")
    shutil.rmtree(tmp_path / "in")
    for flag, factor in ((True, 2), (False, 3)):
        np.testing.assert_array_equal(run(tmp_path / "out.onnx", {"x": X, "flag": np.array(flag)})["y"], factor * X)


def test_reading_loads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path)

    def load(*_: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(numpy_helper, "to_array", load)
    monkeypatch.setattr(onnx.external_data_helper, "load_external_data_for_tensor", load)
    assert [str(v) for v in read(path).values() if v.is_constant] == ["W: float32[64, 64]", "b: float32[64]"]


@pytest.mark.slow
def test_a_model_of_more_than_two_gigabytes(tmp_path: Path) -> None:
    """Five weights of 460 MB, in a sparse file: read and written without ONNX's 2 GB limit in the way."""
    if shutil.disk_usage(tmp_path).free < 6 << 30:
        pytest.skip("not enough disk")
    rows, count = 1_800_000, 5
    size = rows * 64 * 4
    weights = []
    for k in range(count):
        tensor = TensorProto(name=f"w{k}", dims=[rows, 64], data_type=TensorProto.FLOAT, raw_data=b"0")
        onnx.external_data_helper.set_external_data(tensor, "in.data", k * size, size)
        tensor.ClearField("raw_data")
        weights.append(tensor)
    nodes = [node("Gather", [f"w{k}", "row"], [f"g{k}"]) for k in range(count)]
    nodes.append(node("Sum", [f"g{k}" for k in range(count)], ["y"]))
    graph = helper.make_graph(nodes, "g", [info("row", [3], TensorProto.INT64)], [info("y", [3, 64])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    rng = np.random.default_rng(0)
    with (tmp_path / "in.data").open("wb") as file:
        file.truncate(count * size)
        for k in range(count):
            file.seek(k * size + 64 * 4 * 7)
            file.write(rng.normal(size=64).astype(np.float32).tobytes())
    write(read(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    inputs = {"row": np.array([7, 0, rows - 1])}
    expected = run(tmp_path / "in.onnx", inputs)["y"]
    (tmp_path / "in.data").unlink()
    assert (tmp_path / "out.onnx.data").stat().st_size >= count * size
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", inputs)["y"], expected)
    assert expected.any()


# Element types.


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_element_types_are_kept(tmp_path: Path, kind: int) -> None:
    path = through_file(small(kind=kind), tmp_path)
    x = X.astype(helper.tensor_dtype_to_np_dtype(kind))
    np.testing.assert_array_equal(run(path, {"x": x})["y"], run(tmp_path / "in.onnx", {"x": x})["y"])
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == kind


@pytest.mark.parametrize("as_node", [True, False])
@pytest.mark.parametrize("raw", [True, False])
def test_bfloat16_constants_survive(tmp_path: Path, raw: bool, as_node: bool) -> None:
    """bfloat16 has no NumPy type of its own: the bits must arrive all the same."""
    numbers = [1.0, -2.5, 3.140625, 65280.0]
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, [4], numbers)
    if raw:
        tensor = TensorProto(
            name="w",
            dims=[4],
            data_type=TensorProto.BFLOAT16,
            raw_data=np.array(tensor.int32_data, np.uint16).tobytes(),
        )
    nodes = [node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT), node("Mul", ["x", "wide"], ["y"])]
    if as_node:
        nodes.insert(0, node("Constant", [], ["w"], value=tensor))
    graph = helper.make_graph(nodes, "g", [info("x", [4])], [info("y", [4])], [] if as_node else [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = run(through_file(model, tmp_path), {"x": np.ones(4, np.float32)})["y"]
    np.testing.assert_array_equal(found, np.array(numbers, np.float32))


def test_a_bfloat16_weight_that_nobody_folds_survives() -> None:
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, [4], [1.0, -2.5, 3.140625, 65280.0])
    nodes = [node("Add", ["x", "w"], ["y"])]
    kind = TensorProto.BFLOAT16
    graph = helper.make_graph(nodes, "g", [info("x", [4], kind)], [info("y", [4], kind)], [tensor])
    written = to_model(read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)))
    (weight,) = written.graph.initializer
    assert weight.data_type == kind
    np.testing.assert_array_equal(numpy_helper.to_array(weight), numpy_helper.to_array(tensor))
    assert [v.type.tensor_type.elem_type for v in (*written.graph.input, *written.graph.output)] == [kind, kind]


def test_strings_survive() -> None:
    labels = helper.make_tensor("labels", TensorProto.STRING, [3], ["a", "bc", "d" * 2000])
    nodes = [node("Gather", ["labels", "index"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [info("index", [2], TensorProto.INT64)], [info("y", [2], TensorProto.STRING)], [labels]
    )
    written = to_model(read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)))
    assert run(written, {"index": np.array([1, 0])})["y"].tolist() == ["bc", "a"]


# Functions in the source.


def test_functions_of_the_model_are_written_out() -> None:
    model = small()
    function = helper.make_function(
        "my.layers", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model.functions.append(function)
    model.graph.node[2].CopyFrom(node("Twice", ["a"], ["y"], domain="my.layers"))
    model.opset_import.append(helper.make_opsetid("my.layers", 1))
    original = onnx.ModelProto.FromString(model.SerializeToString())
    graph = read(model)
    assert [n.op for n in graph.nodes] == ["MatMul", "Add", "Add"]
    np.testing.assert_array_equal(run(to_model(graph), {"x": X})["y"], run(original, {"x": X})["y"])


@pytest.mark.parametrize("domain", [None, "my.layers", "attnrewrite"])
@pytest.mark.parametrize("opset", [11, 17])
def test_reading_leaves_a_model_in_memory_as_it_is(opset: int, domain: str | None) -> None:
    model = small()
    model.opset_import[0].version = opset
    model.graph.node[2].CopyFrom(node("Softmax", ["a"], ["y"], axis=1))
    if domain is not None:
        imports = [helper.make_opsetid("", opset)]
        model.functions.append(helper.make_function(domain, "F", ["a"], ["b"], [node("Neg", ["a"], ["b"])], imports))
    before = model.SerializeToString(deterministic=True)
    to_model(read(model))
    assert model.SerializeToString(deterministic=True) == before


# Names and outputs.


def test_every_written_node_has_a_name_of_its_own() -> None:
    """ONNX Runtime refuses two nodes of one name; a name made up for a nameless node may be taken already."""
    model = small()
    names = ["", "Add", ""]
    for n, name in zip(model.graph.node, names, strict=True):
        n.op_type, n.name = ("MatMul" if n.op_type == "MatMul" else "Add"), name
    model.graph.node[2].input[:] = ["a", "a"]
    for k in range(3):
        model.graph.node.append(node("Relu", ["y"], [f"z{k}"], name="Relu"))
        model.graph.output.append(info(f"z{k}", ["batch", 64]))
    written = to_model(read(model))
    assert [n.name for n in written.graph.node] == ["MatMul", "Add", "Add_1", "Relu", "Relu_1", "Relu_2"]
    assert run(written, {"x": X}).keys() == {"y", "z0", "z1", "z2"}


def outputs_model(nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(128, dtype=np.float32).reshape(2, 64), "w")
    graph = helper.make_graph(nodes, "g", [info("x", [2, 64])], [info(o, [2, 64]) for o in outputs], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


UNUSUAL_OUTPUTS: dict[str, onnx.ModelProto] = {
    "a-constant": outputs_model([node("Relu", ["x"], ["y"])], ["y", "w"]),
    "a-constant-used-too": outputs_model([node("Add", ["x", "w"], ["y"])], ["y", "w"]),
    "a-constant-node": outputs_model(
        [
            node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones((2, 64), np.float32))),
            node("Relu", ["x"], ["y"]),
        ],
        ["c", "y"],
    ),
    "a-folded-constant": outputs_model([node("Add", ["w", "w"], ["c"]), node("Add", ["x", "c"], ["y"])], ["c", "y"]),
    "an-input": outputs_model([node("Relu", ["x"], ["y"])], ["x", "y"]),
    "an-input-by-identity": outputs_model([node("Identity", ["x"], ["y"])], ["y"]),
    "nothing-but-a-constant": outputs_model([node("Identity", ["w"], ["y"])], ["y"]),
    "an-inner-result-too": outputs_model([node("Relu", ["x"], ["r"]), node("Neg", ["r"], ["y"])], ["y", "r"]),
    "behind-two-nodes-that-do-nothing": outputs_model(
        [
            node("Relu", ["x"], ["r"]),
            node("Identity", ["r"], ["i"]),
            node("Identity", ["i"], ["y"]),
            node("Exp", ["i"], ["z"]),
        ],
        ["y", "i", "z"],
    ),
}


@pytest.mark.parametrize("case", UNUSUAL_OUTPUTS)
def test_unusual_outputs(case: str) -> None:
    original = UNUSUAL_OUTPUTS[case]
    written = to_model(read(original))
    assert [o.name for o in written.graph.output] == [o.name for o in original.graph.output]
    expected = run(original, {"x": X})
    found = run(written, {"x": X})
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_an_omitted_output_in_the_middle_stays_omitted() -> None:
    """LayerNormalization without its mean but with its inverse deviation."""
    nodes = [
        node("LayerNormalization", ["x", "w"], ["n", "", "inverse"], axis=-1),
        node("Mul", ["n", "inverse"], ["y"]),
    ]
    model = outputs_model(nodes, ["y"])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(64, np.float32), "w"))
    np.testing.assert_array_equal(run(to_model(read(model)), {"x": X})["y"], run(model, {"x": X})["y"])


def test_weights_listed_as_inputs_too_are_weights(tmp_path: Path) -> None:
    """As files of IR version 3 must."""
    model = small()
    model.ir_version = 3
    model.graph.input.extend([info("W", [64, 64]), info("b", [64])])
    path = through_file(model, tmp_path)
    assert [i.name for i in onnx.load(path).graph.input] == ["x"]
    np.testing.assert_array_equal(run(path, {"x": X})["y"], run(tmp_path / "in.onnx", {"x": X})["y"])


# Whole models.


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", SMALL)
def test_reading_and_writing_keeps_the_function(name: str, exporter: str, tmp_path: Path) -> None:
    """Folding removes most of a TorchScript file; 1e-6 is what float32 leaves where ONNX Runtime fuses otherwise."""
    path = exported(name, exporter, dynamic_batch=True)
    graph = read(path)
    write(graph, tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx")
    # What computes a symbolic extent for others (the class token is repeated for the batch) must remain.
    assert not [
        n for n in graph.nodes if n.op in ("Constant", "ConstantOfShape", "Range", "Shape") and name != "vit_timm"
    ]
    for reference in references(path)[:1]:
        assert error(run(tmp_path / "out.onnx", reference.inputs)["y"], run(path, reference.inputs)["y"]) <= 1e-6


def test_symbolic_inputs_are_specialised(tmp_path: Path) -> None:
    path = exported("small_swin_padded", "torchscript", dynamic_batch=True)
    graph = read(path, {"x": (2, 3, 60, 88)})
    assert all(v.shape is not None and all(isinstance(e, int) for e in v.shape) for v in graph.values())
    reference = references(path)[1]
    assert error(run(to_model(graph), reference.inputs)["y"], reference.outputs["y"]) <= 1e-5


def test_the_builders_models_have_no_dead_weight() -> None:
    g = Builder()
    g.constant(np.zeros(5))
    written = to_model(read(g.model({"y": g.op("Relu", g.input("x", [2]))})))
    assert not written.graph.initializer
