"""Replayed launches compute what the same launches compute one by one; TVM's builtins for it are stood in for here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm import relax, tirx  # noqa: E402
from tvm.relax import op  # noqa: E402

from attnrewrite.errors import CompilerError  # noqa: E402
from attnrewrite.lowering import build, cuda_compiler  # noqa: E402
from attnrewrite.lowering.registered import registered  # noqa: E402
from attnrewrite.lowering.targets import parse_target  # noqa: E402

Body = Callable[[Any, Any], Any]
ENTRIES = (build.ENTRY, build.REPLAYED_ENTRY)
WEIGHT = np.random.default_rng(0).standard_normal((48, 48)).astype(np.float32) / 7


def chain(x: Any, w: Any) -> Any:
    """Three steps that touch neither the input nor the output, and a view between them."""
    for _ in range(2):
        x = op.nn.softmax(op.matmul(x, w))
    return op.nn.softmax(op.matmul(op.reshape(x, (2, 9, 48)), w))


def chain_that_reads_its_input_again(x: Any, w: Any) -> Any:
    return chain(op.add(op.reshape(chain(x, w), (3, 6, 48)), x), w)


def two_outputs(x: Any, w: Any) -> Any:
    half = chain(x, w)
    return relax.Tuple([half, op.nn.softmax(op.matmul(half, w))])


def short(x: Any, w: Any) -> Any:
    return op.nn.softmax(op.matmul(x, w))


def module(body: Body, rows: Any = 3) -> Any:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((rows, 6, 48), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(body(x, relax.const(WEIGHT)))
        builder.emit_func_output(result)
    return builder.get()


def built(body: Body, rows: Any = 3) -> build.Built:
    return build.build(module(body, rows), tvm.target.Target("llvm"), separate_weights=0, replay=True)


class Recorded:
    """What TVM's CUDA runtime keeps of a virtual machine: memory by index, and what was launched first by index."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.launches: dict[int, Any] = {}
        self.replayed = 0

    def get_cached_alloc(self, machine: Any, function: Any, index: int) -> Any:
        if index not in self.memory:
            self.memory[index] = invoke(machine, function)
        return self.memory[index]

    def run_or_capture(self, machine: Any, function: Any, operands: Any, index: int) -> Any:
        """A graph launches on the operands it was captured with."""
        self.replayed += index in self.launches
        first = self.launches.setdefault(index, tuple(operands))
        return invoke(machine, function, *first)


def invoke(machine: Any, function: Any, *arguments: Any) -> Any:
    return tvm.get_global_func("vm.builtin.invoke_closure")(machine, function, *arguments)


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    recorded = Recorded()
    with (
        registered("vm.builtin.cuda_graph.get_cached_alloc", recorded.get_cached_alloc),
        registered("vm.builtin.cuda_graph.run_or_capture", recorded.run_or_capture),
    ):
        yield recorded


@pytest.mark.parametrize(("body", "graphs"), [(chain, 1), (chain_that_reads_its_input_again, 2), (two_outputs, 1)])
def test_replayed_launches_compute_the_same(recorded: Recorded, body: Body, graphs: int) -> None:
    compiled = built(body)
    machine = relax.VirtualMachine(compiled.executable, tvm.cpu())
    kept = []
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((3, 6, 48)).astype(np.float32)
        plain, replayed = (as_arrays(machine[name](tvm.runtime.tensor(x), *compiled.weights)) for name in ENTRIES)
        kept.append((plain, replayed))
    # Compared at the end: no output lies in memory that later runs write to.
    for plain, replayed in kept:
        for expected, found in zip(plain, replayed, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(kept[0][0][0], kept[1][0][0])
    assert (len(recorded.memory), len(recorded.launches), recorded.replayed) == (1, graphs, 2 * graphs)


def as_arrays(result: Any) -> list[np.ndarray]:
    """Not copied."""
    return [np.from_dlpack(tensor) for tensor in ([result] if hasattr(result, "numpy") else result)]


def of_any_batch(x: Any, w: Any) -> Any:
    for _ in range(4):
        x = op.nn.softmax(op.matmul(x, w))
    return x


def test_views_of_weights_are_none_of_memory(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one is left that could have been computed at once."""
    monkeypatch.setattr(build.transform, "FoldConstant", lambda: tvm.transform.Sequential([]))
    compiled = built(lambda x, w: chain(x, op.reshape(relax.const(WEIGHT.reshape(24, 96)), (48, 48))))
    assert compiled.replayed
    machine = relax.VirtualMachine(compiled.executable, tvm.cpu())
    x = tvm.runtime.tensor(np.random.default_rng(0).standard_normal((3, 6, 48)).astype(np.float32))
    for _ in range(2):
        plain, replayed = (as_arrays(machine[name](x, *compiled.weights)) for name in ENTRIES)
        np.testing.assert_array_equal(replayed[0], plain[0])


NOTHING_TO_CAPTURE = {
    "two kernels, of the input and of the output": (short, 3),
    "a symbolic batch": (of_any_batch, tirx.Var("batch", "int64")),
}


@pytest.mark.parametrize("case", NOTHING_TO_CAPTURE)
def test_nothing_is_captured(case: str) -> None:
    compiled = built(*NOTHING_TO_CAPTURE[case])
    assert not compiled.replayed
    assert build.REPLAYED_ENTRY not in compiled.executable.as_text()


def test_a_cuda_library_has_both_entries() -> None:
    target = parse_target("cuda:sm_75")
    try:
        with cuda_compiler.embedded_cubins(target.architectures):
            compiled = build.build(module(of_any_batch), build.tvm_target(target), replay=True)
    except CompilerError as error:
        pytest.skip(str(error))
    text = compiled.executable.as_text()
    assert compiled.replayed
    functions = re.findall(r"^@(main\w*):", text, re.MULTILINE)
    assert sorted(functions) == ["main", "main_replayed", "main_replayed_launches_0", "main_replayed_memory"]
    assert len(re.findall(r"call  vm.builtin.cuda_graph.run_or_capture", text)) == 1
