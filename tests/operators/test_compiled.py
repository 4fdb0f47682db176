"""The operators by TVM's kernels: the same results, no copies of split maps, and torch wherever no kernel is."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from attnrewrite.errors import CompilerError  # noqa: E402
from attnrewrite.operators import compiled, general  # noqa: E402
from attnrewrite.operators.schema import call  # noqa: E402
from tests.models.build import CACHE_VARIABLE  # noqa: E402
from tests.operators.test_schema import CASES, expected, tensors  # noqa: E402
from tests.running import error  # noqa: E402

FLOAT32 = 2e-6  # of max |reference|, as for the bodies; the kernels' weights are within 2e-7

NAMES = ("shifted-with-mask", "padded-with-vectors", "relative-per-head", "k3", "learned-shared-by-heads")
PARTS = ("shifted-with-mask", "k3")


def parts(name: str) -> tuple[Any, dict[str, Any]]:
    """The case with query, key and value of one width as parts of one map."""
    case = CASES[name]
    operands = tensors(case)
    axis = -1 if name == "shifted-with-mask" else 1
    width = operands["query"].shape[axis]
    operands["value"] = operands["value"].narrow(axis, 0, width)
    maps = torch.cat([operands[n] for n in ("query", "key", "value")], axis)
    return case.spec, operands | dict(zip(("query", "key", "value"), maps.split(width, axis), strict=True))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[compiled.Prepared]:
    """Kernels of all sites of this file, compiled by one process, or by an earlier run of the tests."""
    kept = os.environ.get(CACHE_VARIABLE)
    folder = Path(kept) / "operators" if kept else tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNREWRITE_CACHE", str(folder))
        patch.setattr(compiled, "_state", compiled._State())
        compiled.use_kernels(True)
        sites = [(CASES[n].spec, tensors(CASES[n])) for n in NAMES]
        yield compiled.prepare([*sites, *map(parts, PARTS)])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_kernels_compute_what_the_op_means(name: str, batch: int) -> None:
    case = replace(CASES[name], batch=batch)
    found = compiled.results_of(case.spec, tensors(case))
    assert found is not None
    assert error(found[0].numpy(), expected(case)[0]) <= FLOAT32


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_map_are_read_where_they_are(name: str) -> None:
    spec, operands = parts(name)
    kernel = compiled.kernel_of(spec, operands)
    assert kernel is not None
    assert [n for n, _ in kernel.steps] == ["query", "key", "value"]
    maps = ("query", "key", "value")
    assert compiled.kernel_of(spec, {n: t[:1] if n in maps else t for n, t in operands.items()}) == kernel
    found = compiled.results_of(spec, operands)
    assert found is not None
    assert error(found[0].numpy(), general.run(spec, operands)[0].numpy()) <= FLOAT32


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
def test_operands_that_begin_at_any_number_are_read(name: str) -> None:
    """As those made by NumPy, or indexed from the second element of a vector on."""
    case = CASES[name]
    moved = {n: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape) for n, t in tensors(case).items()}
    assert all(t.data_ptr() % 64 == 4 for t in moved.values())
    found = compiled.results_of(case.spec, moved)
    assert found is not None
    assert error(found[0].numpy(), expected(case)[0]) <= FLOAT32


@pytest.mark.usefixtures("kernels")
def test_the_operator_calls_the_kernel_with_gradients_as_without() -> None:
    case = CASES["shifted-with-mask"]
    operands = {n: t.requires_grad_() for n, t in tensors(case).items()}
    overload, args, keywords = call(case.spec, operands)
    result = overload(*args, **keywords)
    kernel = compiled.results_of(case.spec, tensors(case))
    assert kernel is not None
    assert torch.equal(result, kernel[0])
    result.square().sum().backward()
    exact = {n: t.double().requires_grad_() for n, t in tensors(case).items()}
    general.run(case.spec, exact)[0].square().sum().backward()
    assert all(error(operands[n].grad.numpy(), t.grad.numpy()) <= 1e-5 for n, t in exact.items())


def test_what_is_prepared_is_not_prepared_again(kernels: compiled.Prepared) -> None:
    assert not kernels.failed
    assert kernels.compiled + kernels.kept == len(NAMES) + len(PARTS)
    again = compiled.prepare([(CASES[n].spec, tensors(CASES[n])) for n in NAMES])
    assert (again.compiled, again.kept) == (0, len(NAMES))


@pytest.mark.usefixtures("kernels")
def test_libraries_are_found_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_state", compiled._State())
    compiled.use_kernels(True)
    monkeypatch.setattr(compiled, "_compile", lambda kernels: pytest.fail("compiled again"))
    assert compiled.prepare([(CASES["k3"].spec, tensors(CASES["k3"]))]).kept == 1


LEFT = {
    "another dtype": ("k3", lambda t: t.double()),
    "a border that no kernel has": ("inward", lambda t: t),
    "extra tokens": ("extra-keys", lambda t: t),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("why", LEFT)
def test_torch_computes_what_no_kernel_does(why: str) -> None:
    name, change = LEFT[why]
    operands = {n: change(t) for n, t in tensors(CASES[name]).items()}
    assert compiled.prepare([(CASES[name].spec, operands)]).uncovered == 1
    assert compiled.results_of(CASES[name].spec, operands) is None


@pytest.mark.usefixtures("kernels")
def test_one_warning_where_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kernels: object) -> None:
        raise CompilerError("no linker")

    monkeypatch.setattr(compiled, "_state", compiled._State())
    monkeypatch.setattr(compiled, "_compile", fail)
    monkeypatch.setattr(compiled, "_load", lambda kernel: False)
    compiled.use_kernels(True)
    with pytest.warns(UserWarning, match="no linker") as warned:
        both = [compiled.prepare([(CASES[n].spec, tensors(CASES[n]))]) for n in ("k3", "learned-shared-by-heads")]
    assert [prepared.failed for prepared in both] == [("no linker",)] * 2
    assert len(warned) == 1
    assert compiled.results_of(CASES["k3"].spec, tensors(CASES["k3"])) is None


@pytest.mark.usefixtures("kernels")
def test_a_kernel_is_made_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is computed in torch; as soon as the kernel is there it is used."""
    monkeypatch.setattr(compiled, "_state", compiled._State())
    compiled.use_kernels(True)
    case = CASES["k3"]
    assert compiled.results_of(case.spec, tensors(case)) is None
    worker = compiled._state.worker
    assert worker is not None
    worker.join(60)
    found = compiled.results_of(case.spec, tensors(case))
    assert found is not None
    assert error(found[0].numpy(), expected(case)[0]) <= FLOAT32


@pytest.mark.usefixtures("kernels")
def test_training_does_not_depend_on_when_a_kernel_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """One made in the background is for inference; a prepared one is used from the first step on."""
    monkeypatch.setattr(compiled, "_state", compiled._State())
    compiled.use_kernels(True)
    spec, operands = CASES["k3"].spec, tensors(CASES["k3"])
    trained = {n: t.clone().requires_grad_() for n, t in operands.items()}
    assert compiled.results_of(spec, trained) is None
    assert compiled._state.worker is None
    assert compiled.results_of(spec, operands) is None
    assert compiled._state.worker is not None
    compiled._state.worker.join(60)
    assert compiled.results_of(spec, operands) is not None
    assert compiled.results_of(spec, trained) is None
    compiled.prepare([(spec, operands)])
    assert compiled.results_of(spec, trained) is not None


@pytest.mark.usefixtures("kernels")
def test_another_bias_is_another_result() -> None:
    """Biases are kept as the kernel reads them; one that was written to, or lies where another lay, is noticed."""
    case = CASES["shifted-with-mask"]
    operands = tensors(case)
    for _ in range(3):
        found = compiled.results_of(case.spec, operands)
        assert found is not None
        assert error(found[0].numpy(), general.run(case.spec, operands)[0].numpy()) <= FLOAT32
        operands["bias"].data.mul_(-1.5)


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_state", compiled._State())
    monkeypatch.setenv("ATTNREWRITE_KERNELS", "off")
    assert not compiled.kernels_are_used()
    case = CASES["k3"]
    assert compiled.results_of(case.spec, tensors(case)) is None
    assert compiled._state.worker is None


def test_an_interpreter_may_end_while_a_kernel_is_made(tmp_path: Path) -> None:
    """A thread that is in C++ when its interpreter ends would abort the process, so it has ended before."""
    script = """
        import atexit, sys, threading, time
        atexit.register(lambda: print([t.name for t in threading.enumerate()]))  # called last: after the package's own
        import torch
        from attnrewrite.nn import FlashWindowAttention
        with torch.no_grad():
            FlashWindowAttention(8, 2, 4)(torch.zeros(1, 4, 4, 8))
        while "tvm" not in sys.modules:  # it is being imported from here on
            time.sleep(0.001)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "ATTNREWRITE_CACHE": str(tmp_path), "ATTNREWRITE_KERNELS": "auto"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "['MainThread']\n", "")
    assert not list(tmp_path.rglob("*.so"))
