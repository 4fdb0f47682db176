"""Graphs that write to tensors: what is read as a new value, what must stay in place, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

from attnrewrite.errors import UserError
from attnrewrite.frontend.fx.program import Expansion, Program
from attnrewrite.frontend.fx.read import read
from attnrewrite.frontend.fx.write import write
from attnrewrite.graph import Graph
from tests.frontend.fx.reading import Called, assert_computes, exported, opaque, traced

X = torch.randn(2, 3, 4)


def expansion(graph: Graph, name: str) -> Expansion:
    program = graph.source
    assert isinstance(program, Program)
    return next(e for n, e in program.expansions.items() if n.name == name)


def test_module_in_place_is_its_operator() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)).eval()
    graph = traced(module, (X,))
    assert [n.op for n in expansion(graph, "_1").nodes] == ["Relu"]
    assert expansion(graph, "_1").replaces and not expansion(graph, "_1").stays
    assert_computes(graph, module, (X,))


def test_later_readers_see_what_was_written() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, 1:2] = 0
        return y + 1

    graph = exported(function, (X,))
    assert_computes(graph, function, (X,))
    (reader,) = [n for n in graph.source.values if n.name.startswith("add")]
    ((old, now),) = expansion(graph, reader.name).seen.items()
    assert graph.source.values[old] is not now
    assert now in expansion(graph, reader.name).reads


def test_constants_made_of_what_was_written_say_so() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        table = torch.zeros(3, 4)
        table[:, 1] += 5
        return x + table.sum(-1, keepdim=True)

    program = torch.export.export(Called(function), (X,))
    graph = read(program)
    (total,) = [n for n in graph.source.values if n.name.startswith("sum")]
    ((_, now),) = expansion(graph, total.name).seen.items()
    assert now.is_constant and now.constant[:, 1].tolist() == [5, 5, 5]
    write(graph)
    torch.testing.assert_close(program.module()(X), function(X), rtol=0, atol=0)


class Counting(nn.Module):
    """A buffer that counts the calls and is added to the input."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + self.calls


def test_buffer_that_is_written_to_is_no_constant() -> None:
    graph = exported(Counting(), (X,))
    assert [n.op for n in graph.nodes] == ["state", "aten.add_.Tensor", "Add"]
    assert expansion(graph, "add_").stays


class Restless(nn.Module):
    """A buffer that is read before it is written to."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.seen
        self.seen.copy_(y.mean((0, 2))[:, None])
        return y


def reads_before() -> None:
    exported(Restless(), (X,))


def writes_an_input() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        x.mul_(2)
        return y

    exported(function, (X,))


def writes_through_a_diagonal() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.diagonal(0, 1, 2).zero_()
        return y

    exported(function, (X,))


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "buffer read before": (reads_before, "copy_ writes to the tensor seen, which add has read before"),
    "input read before": (writes_an_input, "mul_ writes to the input inputs_0, which add has read before"),
    "diagonal": (writes_through_a_diagonal, "zero_ cannot be read: a write through diagonal: aten.zero_.default"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_depends_on_when_it_runs_is_refused(case: str) -> None:
    function, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        function()


def test_training_stays_random() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    graph = exported(module, (torch.randn(2, 3, 4, 4),))
    assert sorted(opaque(graph)) == ["aten.batch_norm.default", "aten.dropout.default", "state", "state"]
    assert expansion(graph, "batch_norm").stays and expansion(graph, "add_").stays
    assert not expansion(graph, "dropout").stays


def test_dropped_paths_are_drawn_anew() -> None:
    def drop_path(x: torch.Tensor) -> torch.Tensor:
        return x * x.new_empty((2, 1, 1)).bernoulli_(0.5).div_(0.5)

    graph = exported(drop_path, (X,))
    assert opaque(graph) == ["aten.bernoulli.p"]
    assert expansion(graph, "bernoulli_").replaces


def test_in_place_on_the_input_stays() -> None:
    graph = traced(lambda x: F.relu(x, inplace=True) + 1, (X,))
    assert opaque(graph) == ["aten.relu_.default"]
    assert expansion(graph, "relu").stays
