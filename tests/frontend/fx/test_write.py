"""Edited graphs written back into their torch.fx graphs, of three dialects."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from attnrewrite import Pass, Pipeline, passes
from attnrewrite.errors import UserError
from attnrewrite.facts import Facts
from attnrewrite.frontend.fx.program import Live
from attnrewrite.frontend.fx.read import read
from attnrewrite.frontend.fx.write import write
from attnrewrite.graph import Graph, Node, Value
from examples.custom_pass import merge_slices
from tests.frontend.fx.reading import as_module
from tests.frontend.fx.test_aten import ROWS, inputs_of
from tests.models.build import MODELS, build_model

CHANNELS, HEADS, WINDOW = 12, 3, 4
FLOAT32 = 1e-6  # of max |reference|: sums of 48 products at most, in another order


def attended(x: torch.Tensor, qkv: nn.Linear, bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Window attention on [B, 8, 12, C], written with windows as rows; symbolic_trace can follow it."""
    windows = x.reshape(-1, 2, WINDOW, 3, WINDOW, CHANNELS).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, CHANNELS)
    q, k, v = qkv(windows).reshape(-1, 16, 3, HEADS, CHANNELS // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * (CHANNELS // HEADS) ** -0.5) @ k.transpose(-2, -1) + bias
    if mask is not None:
        logits = (logits.view(-1, 6, HEADS, 16, 16) + mask.unsqueeze(1).unsqueeze(0)).view(-1, HEADS, 16, 16)
    x = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, 16, CHANNELS)
    x = x.view(-1, 2, 3, WINDOW, WINDOW, CHANNELS).permute(0, 1, 3, 2, 4, 5).contiguous()
    return x.view(-1, 8, 12, CHANNELS)


class Block(nn.Module):
    """A Swin block in miniature: [B, 8, 12, 12] -> the same."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.proj = nn.Linear(CHANNELS, CHANNELS)
        self.drop = nn.Dropout(0.1)
        self.table = nn.Parameter(torch.randn(49, HEADS))
        rows = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        offsets = rows[:, :, None] - rows[:, None, :] + 3
        self.register_buffer("index", offsets[0] * 7 + offsets[1])
        regions = torch.zeros(8, 12)
        for k, part in enumerate((slice(0, -4), slice(-4, -shift), slice(-shift, None)) if shift else ()):
            regions[part] += 3 * k
            regions[:, part] += k
        tokens = regions.view(2, 4, 3, 4).permute(0, 2, 1, 3).reshape(6, 16)
        self.register_buffer("mask", (tokens[:, None] != tokens[:, :, None]) * -100.0 if shift else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut, x = x, self.norm(x)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        bias = self.table[self.index.view(-1)].view(16, 16, HEADS).permute(2, 0, 1).unsqueeze(0)
        x = attended(x, self.qkv, bias, self.mask)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return shortcut + self.drop(self.proj(x))


def swin() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(2), nn.Linear(CHANNELS, 5)).eval()


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 8, 12, CHANNELS, generator=torch.Generator().manual_seed(batch))


Program = torch.fx.GraphModule | ExportedProgram


def exported(module: nn.Module, inputs: Sequence[Any], **options: Any) -> Graph:
    return read(export(module, tuple(inputs), **options))


def unlifted(module: nn.Module, inputs: Sequence[Any], **options: Any) -> Graph:
    program = export(module, tuple(inputs), **options).module()
    assert isinstance(program, torch.fx.GraphModule)
    return read(program, tuple(inputs))


def traced(module: nn.Module, inputs: Sequence[Any]) -> Graph:
    return read(torch.fx.symbolic_trace(module), tuple(inputs))


DIALECTS: dict[str, Callable[..., Graph]] = {"exported": exported, "unlifted": unlifted, "traced": traced}


def callable_of(program: Program) -> Any:
    return program.module() if isinstance(program, ExportedProgram) else program


def targets(program: Program) -> Counter[str]:
    return Counter(str(n.target) for n in program.graph.nodes if n.op.startswith("call"))


def rewritten(graph: Graph, count: int = 2, using: Sequence[Pass] = passes.ALL) -> Program:
    """The program with the default passes' edits, of which there must be so many."""
    assert sum(Pipeline(using).run(graph).rewrites.values()) == count
    return write(graph)


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = FLOAT32) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= bound * expected.abs().max()


OP = "attnrewrite.flash_window_attention.default"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_rewritten_program_computes_what_it_computed(dialect: str) -> None:
    module = swin()
    program = rewritten(DIALECTS[dialect](module, (image(),)))
    assert targets(program)[OP] == 2
    assert not any("softmax" in t or "roll" in t for t in targets(program))
    close(callable_of(program)(image()), module(image()))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_without_an_edit_the_graph_stays_as_it_was(dialect: str) -> None:
    graph = DIALECTS[dialect](swin(), (image(),))
    program = graph.source.exported or graph.source.module
    before, code = list(program.graph.nodes), str(program.graph)
    assert write(graph) is program
    assert list(program.graph.nodes) == before and str(program.graph) == code


@pytest.mark.parametrize("dialect", DIALECTS)
def test_state_is_what_it_was(dialect: str) -> None:
    module = swin()
    graph = DIALECTS[dialect](module, (image(),))
    names = set(callable_of(graph.source.exported or graph.source.module).state_dict())
    program = rewritten(graph)
    assert set(callable_of(program).state_dict()) == names
    assert {n for n, _ in callable_of(program).named_parameters()} == {n for n, _ in module.named_parameters()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_linear_layers_keep_their_parameters(dialect: str) -> None:
    """Moved to the feature map, a layer reads the same parameter, not a copy."""
    module = swin()
    call = callable_of(rewritten(DIALECTS[dialect](module, (image(),))))
    x = image()
    before = call(x)
    with torch.no_grad():
        dict(call.named_parameters())["0.qkv.weight"].mul_(3)
        dict(module.named_parameters())["0.qkv.weight"].copy_(dict(call.named_parameters())["0.qkv.weight"])
    assert not torch.equal(call(x), before)
    close(call(x), module(x))


def test_an_archive_of_a_rewritten_program_can_be_loaded() -> None:
    module = swin()
    program = rewritten(exported(module, (image(),)))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert targets(loaded)[OP] == 2
    close(loaded.module()(image()), module(image()))


@pytest.mark.parametrize("dialect", ["exported", "unlifted"])
def test_a_symbolic_batch_stays_one_and_so_does_its_guard(dialect: str) -> None:
    module = swin()
    shapes = {"input": {0: Dim("batch", max=8)}}
    call = callable_of(rewritten(DIALECTS[dialect](module, (image(2),), dynamic_shapes=shapes)))
    for batch in (3, 5):
        close(call(image(batch)), module(image(batch)))
    with pytest.raises((AssertionError, RuntimeError), match="<= 8"):
        call(image(9))


def test_rewritten_programs_are_exported_and_compiled_again() -> None:
    module = swin()
    program = rewritten(exported(module, (image(),), dynamic_shapes={"input": {0: Dim("batch", max=8)}}))
    close(torch.compile(program.module(), backend="aot_eager")(image()), module(image()))
    again = export(program.module(), (image(),))
    assert targets(again)[OP] == 2
    decomposed = program.run_decompositions()
    close(decomposed.module()(image(3)), module(image(3)))


def test_new_nodes_say_where_they_come_from() -> None:
    program = rewritten(exported(swin(), (image(),)))
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta and "nn_module_stack" in node.meta, node
    ops = [n for n in program.graph.nodes if str(n.target) == OP]
    assert ["Block" in str(n.meta["nn_module_stack"]) and "attended" in n.meta["stack_trace"] for n in ops] == [
        True
    ] * 2


def test_training_mode_reaches_the_parameters() -> None:
    """The bias that was gathered from the table is gathered again whenever the program runs."""
    module = swin()
    graph = traced(module, (image(),))
    assert sum(Pipeline(passes.ALL).run(graph).rewrites.values()) == 2
    ops = [n for n in graph.nodes if n.domain == "attnrewrite"]
    gathered = {n.name: v for n, v in graph.source.values.items() if n.name.startswith("unsqueeze")}
    tables = [v for v in gathered.values() if v.shape == (1, HEADS, 16, 16)]
    live = {}
    for op, table in zip(ops, tables, strict=True):
        bias = op.required(3)
        assert bias.shape == (1, HEADS, 16, 16)
        positions = np.arange(bias.constant.size).reshape(bias.shape)
        live[bias] = Live((table,), positions if op is ops[0] else None)
    call = callable_of(write(graph, live))
    close(call(image()), module(image()))
    (call(image()).square().sum()).backward()
    (module(image()).square().sum()).backward()
    expected = {n: p.grad for n, p in module.named_parameters()}
    for name, parameter in call.named_parameters():
        assert parameter.grad is not None and expected[name] is not None, name
        close(parameter.grad, expected[name], 1e-5)


def merged(graph: Graph) -> int:
    return Pipeline([merge_slices]).run(graph).rewrites[merge_slices.name]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_pass_of_ones_own(dialect: str) -> None:
    class Crop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)[:, 1:6:2][:, :, 2:9:2] + 1

    program = rewritten(DIALECTS[dialect](Crop(), (image(),)), 1, [merge_slices])
    assert torch.equal(callable_of(program)(image()), Crop()(image()))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_graph_is_edited_and_written_twice(dialect: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = swin()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x)[:, 1:6:2][:, :, 2:9:2]

    module = Both()
    graph = DIALECTS[dialect](module, (image(),))
    assert merged(graph) == 1
    close(callable_of(write(graph))(image()), module(image()))
    program = rewritten(graph)
    assert targets(program)[OP] == 2
    close(callable_of(program)(image()), module(image()))
    before = str(program.graph)
    assert str(write(graph).graph) == before


@pytest.mark.parametrize("dialect", ["exported", "traced"])
def test_what_was_written_reads_what_a_later_edit_puts_there(dialect: str) -> None:
    """The query, key and value layer stands right behind the slices that the second pass joins."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = swin()
            self.block[0].norm = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x[:, ::2][:, :, ::2])

    x = torch.randn(2, 16, 24, CHANNELS)
    module = Behind()
    graph = DIALECTS[dialect](module, (x,))
    program = rewritten(graph)
    before = str(program.graph)
    assert merged(graph) == 1
    close(callable_of(write(graph))(x), module(x))
    assert str(program.graph) != before and targets(program)[OP] == 2


def test_checks_of_a_tensor_go_with_it() -> None:
    """Export says of a tensor that is cast which dtype it had; that must not keep the softmax alive."""

    def softmax_in_double(x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.softmax(x.to(torch.float64), dim).to(torch.float32)

    module = swin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", softmax_in_double)
        graph = exported(module, (image(),))
    checks = "aten._assert_tensor_metadata.default"
    assert targets(graph.source.module)[checks] == 4
    program = rewritten(graph)
    assert targets(program)[checks] == 0 and targets(program)["aten.softmax.int"] == 0
    close(callable_of(program)(image()), module(image()))


class Nested(nn.Module):
    """Results in dicts and lists, one of them twice, one of them an input; a number among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor, *, factor: float = 1.0, other: dict[str, torch.Tensor]) -> dict[str, Any]:
        y = self.block(x)[:, 1:6:2][:, :, 2:9:2]
        return {"y": y, "all": [y * factor, other["z"]], "x": (x, other["z"] + y.mean())}


@pytest.mark.parametrize("dialect", ["exported", "unlifted"])
def test_nested_arguments_and_results(dialect: str) -> None:
    torch.manual_seed(0)
    module, z = Nested().eval(), torch.randn(3)
    program = export(module, (image(),), {"factor": 2.0, "other": {"z": z}})
    if dialect == "exported":
        graph = read(program)
    else:
        graph = read(program.module())
    Pipeline([*passes.ALL, merge_slices]).run(graph)
    call = callable_of(write(graph))
    found, expected = (f(image(), factor=2.0, other={"z": z}) for f in (call, module))
    assert list(found) == list(expected)
    close(found["y"], expected["y"])
    close(found["all"][0], expected["all"][0])
    close(found["x"][1], expected["x"][1])
    assert torch.equal(found["all"][1], z) and torch.equal(found["x"][0], image())


def test_buffers_are_still_written_to() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = swin()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return self.block(x)

    for dialect in (exported, unlifted):
        module = Counting()
        call = callable_of(rewritten(dialect(module, (image(),))))
        for _ in range(3):
            close(call(image()), module.block(image()))
        assert call.calls == 3


def test_writes_in_place_become_functional() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x[:, 1:6:2][:, :, 2:9:2] * 2
            y.add_(1)
            y[:, :2].zero_()
            return y.relu_()

    graph = traced(InPlace(), (image(),))
    assert merged(graph) == 1
    call = write(graph)
    assert torch.equal(call(image()), InPlace()(image()))
    assert not any("relu_" in t for t in targets(call))


def test_a_view_of_what_is_computed_anew_copies_where_it_must() -> None:
    """The transposed tensor that the pass puts in place of a contiguous one cannot be viewed."""

    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2).contiguous().view(2, -1, 6) + 1

    def match(facts: Facts, node: Node) -> Node | None:
        return node if node.op == "Add" and node.name == "add" else None

    def rewrite(facts: Facts, node: Node) -> None:
        reshape = node.required(0).producer
        assert reshape is not None
        old = reshape.required(0)
        transposed = Value("t", tuple(image().shape[k] for k in (0, 2, 1, 3)), old.dtype)
        facts.graph.insert_before(
            reshape, [Node("Transpose", [facts.graph.inputs[0]], [transposed], {"perm": [0, 2, 1, 3]})]
        )
        reshape.inputs[0] = transposed

    graph = traced(Views(), (image(),))
    program = rewritten(graph, 1, [Pass("transpose-again", match, rewrite)])
    assert torch.equal(program(image()), Views()(image()))


def test_several_symbolic_sizes_are_computed_from_the_inputs() -> None:
    """A Shape of a tensor that is gone: the sizes come from the placeholders."""

    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x[:, :, 1::2][:, :, :, 1::2]).reshape(x.shape[0] * x.shape[1], -1).softmax(-1)

    shapes = {"x": {0: Dim("a", max=8), 1: Dim("b", max=64)}}
    graph = exported(Sizes(), (image(),), dynamic_shapes=shapes)
    program = rewritten(graph, 1, [merge_slices])
    for x in (image(), torch.randn(3, 5, 12, CHANNELS)):
        assert torch.equal(program.module()(x), Sizes()(x))


def test_an_operator_torch_alone_knows_is_kept_or_written_anew() -> None:
    class Opaque(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.special.i0(x[:, 1:6:2][:, :, 2:9:2])
            return torch.nn.functional.interpolate(y, scale_factor=2.0)

    program = rewritten(exported(Opaque(), (image(),)), 1, [merge_slices])
    assert torch.equal(program.module()(image()), Opaque()(image()))


def anew(graph: Graph, every: int) -> None:
    """Put a node of its own in place of every so many, as a pass would that changes all of them."""
    for k, node in enumerate(graph.nodes):
        if k % every == 0 and node.op != "state":
            graph.nodes[k] = Node(node.op, node.inputs, node.outputs, dict(node.attributes), node.name, node.domain)


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ROWS)
def test_whatever_is_read_can_be_written_anew(name: str, every: int) -> None:
    """All nodes emitted, and some of them among nodes that stay."""
    function, shapes = ROWS[name]
    inputs = inputs_of(shapes)
    try:
        graph = traced(function, inputs)
    except (torch.fx.proxy.TraceError, TypeError):  # loops over tensors, assignments to parts of them
        graph = exported(as_module(function), inputs)
    anew(graph, every)
    found = callable_of(write(graph))(*(x.clone() for x in inputs))
    expected = function(*(x.clone() for x in inputs))
    leaves, wanted = (torch.utils._pytree.tree_leaves(r) for r in (found, expected))
    assert len(leaves) == len(wanted)
    for have, want in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=2e-6 * max(_largest(want), 1), equal_nan=True)


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)].abs() if tensor.is_floating_point() else tensor
    return float(finite.max()) if finite.numel() else 0.0


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("name", ["small_swin_padded", "unfold_net"])
def test_models_are_written_anew(name: str, every: int) -> None:
    module, x = build_model(name), torch.randn(MODELS[name].input_shape)
    graph = exported(module, (x,))
    anew(graph, every)
    with torch.no_grad():
        close(callable_of(write(graph))(x), module(x))


def test_a_node_that_counts_on_how_a_tensor_lies_in_memory_is_refused() -> None:
    class Strided(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x[:, 1:6:2][:, :, 2:9:2] + 1
            return torch.as_strided(y, (2, 3), (5, 1))

    graph = traced(Strided(), (image(),))
    assert merged(graph) == 1
    with pytest.raises(UserError, match="as_strided depends on how a tensor lies in memory"):
        write(graph)
