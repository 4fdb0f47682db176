"""The operators on CUDA devices, as far as a machine without one shows it: what is compiled, and how it is called.

CPU tensors stand for those of a GPU, the emulator's Metal device for the GPU.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from attnrewrite import nn, runtime  # noqa: E402
from attnrewrite.emulator import metal_target  # noqa: E402
from attnrewrite.emulator.run import run_function  # noqa: E402
from attnrewrite.errors import CompilerError  # noqa: E402
from attnrewrite.functions.spec import FlashWindowAttention  # noqa: E402
from attnrewrite.lowering import cuda_compiler  # noqa: E402
from attnrewrite.lowering.kernel_library import gpu_kernel  # noqa: E402
from attnrewrite.operators import compiled, general, kernel  # noqa: E402
from attnrewrite.operators.read import as_read_by_gpu  # noqa: E402
from attnrewrite.operators.schema import call  # noqa: E402
from tests.metal.cases import slide, window  # noqa: E402
from tests.metal.conftest import emulator_cache  # noqa: E402, F401
from tests.operators.test_schema import CASES, tensors  # noqa: E402
from tests.running import error  # noqa: E402

ARCHITECTURE = "sm_80"
COMPILE = compiled._compile
FLOAT32 = 1e-5
# The kernels round to float16 once, and read maps and biases that were rounded once before.
FLOAT16 = 4 * 2.0**-11


@dataclass
class Emulated:
    """What was asked to be compiled, the dtypes of each call, and where its operands lay."""

    kernels: list[Any] = field(default_factory=list)
    calls: list[list[Any]] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    fails: str = ""

    def load(self, wanted: Any) -> bool:
        """In place of a library."""
        if self.fails:
            return False
        function = gpu_kernel(wanted.request(), metal_target()).with_attr("global_symbol", "run")
        self.kernels.append(wanted)

        def launch(*arguments: Any) -> None:
            self.calls.append([a.dtype for a in arguments])
            *operands, result = arguments
            self.places.append([t.data_ptr() for t in operands])
            shape, dtype = tuple(result.shape), str(result.dtype).removeprefix("torch.")
            run = run_function(function, [t.numpy() for t in operands], [(shape, dtype)])
            assert run.findings == ()
            result.copy_(torch.from_numpy(run.outputs[0].copy()))

        compiled._state.ready[wanted] = compiled.Loaded(launch, 1)
        return True

    def compile(self, kernels: Any) -> Any:
        return dict.fromkeys(kernels, self.fails)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    emulated = Emulated()
    monkeypatch.setattr(compiled, "_state", compiled._State())
    monkeypatch.setattr(compiled, "_load", emulated.load)
    monkeypatch.setattr(compiled, "_compile", emulated.compile)
    monkeypatch.setattr(kernel, "_device_of", lambda device: ARCHITECTURE)
    compiled.use_kernels(True)
    return emulated


def operands_of(name: str, dtype: Any) -> dict[str, Any]:
    """Of a case; what is added to its logits stays float32."""
    wide = ("bias", "mask", "logit_bias")
    return {n: t if n in wide else t.to(dtype) for n, t in tensors(CASES[name]).items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("shifted-with-mask", torch.float32), ("shifted-with-mask", torch.float16), ("k3", torch.float16)],
)
def test_the_operator_launches_a_kernel_on_the_first_call(gpu: Emulated, name: str, dtype: Any) -> None:
    operands = operands_of(name, dtype)
    overload, args, keywords = call(CASES[name].spec, operands)
    result = overload(*args, **keywords)
    exact = general.run(CASES[name].spec, {n: t.double() for n, t in operands.items()})[0]
    assert error(result.numpy(), exact.numpy()) <= (FLOAT32 if dtype == torch.float32 else FLOAT16)
    assert (len(gpu.kernels), len(gpu.calls), result.dtype) == (1, 1, dtype)
    overload(*args, **keywords)
    assert (len(gpu.kernels), len(gpu.calls), compiled.launched_kernels()) == (1, 2, 2)


PARTS = {
    "windows": window((8, 12), (4, 4), (1, 2), 2, 8, bias="own", mask_value=-100.0),
    "windows-half": window((8, 12), (4, 4), (1, 2), 2, 8, dtype="float16"),
    "heads-of-an-odd-width": window((7, 10), (4, 5), (0, 0), 3, 5, 7, padding=True, dtype="float16"),
    "extra-keys": window((8, 8), (4, 4), (0, 0), 2, 4, extra_keys=(1, 1, 3)),
    "neighbours": slide((6, 8), (3, 3), (1, 1), 2, 4, bias=True),
    "neighbours-half": slide((5, 9), (3, 3), (1, 2), 2, 5, dtype="float16"),
}


def part(tensor: Any, axis: int, before: int, after: int) -> Any:
    """The same numbers in a map that has so many more along an axis, all of them NaN."""
    shape = list(tensor.shape)
    shape[axis] += before + after
    return torch.full(shape, torch.nan, dtype=tensor.dtype).narrow(axis, before, tensor.shape[axis]).copy_(tensor)


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_wider_maps_are_read_where_they_lie(gpu: Emulated, name: str) -> None:
    """First, second and third part of a map that a projection wrote; the next call has another batch."""
    spec, operands = PARTS[name].spec, {n: torch.from_numpy(a) for n, a in PARTS[name].operands.items()}
    axis = -1 if isinstance(spec, FlashWindowAttention) else 1
    for batch in (2, 1):
        alone = {n: t[:batch] if n in kernel.MAPS else t for n, t in operands.items()}
        width = {n: t.shape[axis] for n, t in alone.items()}
        parts = alone | {n: part(alone[n], axis, i * width[n], (2 - i) * width[n]) for i, n in enumerate(kernel.MAPS)}
        found, expected = (compiled.results_of(spec, given) for given in (parts, alone))
        assert found is not None and expected is not None
        assert torch.equal(found[0], expected[0])
        assert gpu.places[-2][:3] == [parts[n].data_ptr() for n in kernel.MAPS]
    assert [dict(k.steps) for k in gpu.kernels] == [{n: 3 * width[n] for n in kernel.MAPS}, {}]


@pytest.mark.parametrize("deformed", [False, True])
def test_a_module_hands_over_the_parts_of_one_map(gpu: Emulated, deformed: bool) -> None:
    torch.manual_seed(0)
    slide, x = nn.SlideAttention(8, 2, deformed=deformed).requires_grad_(False), torch.randn(2, 6, 8, 8)
    compiled.use_kernels(False)
    expected = slide(x)
    compiled.use_kernels(True)
    assert error(slide(x).numpy(), expected.numpy()) <= FLOAT32
    ((query, key, value, *_),) = gpu.places
    assert (key - query, value - key) == (4 * 8 * 6 * 8,) * 2
    assert [dict(k.steps) for k in gpu.kernels] == [dict.fromkeys(kernel.MAPS, 24)]


def test_a_part_that_loads_are_not_aligned_to_is_moved(gpu: Emulated) -> None:
    spec, operands = PARTS["windows"].spec, {n: torch.from_numpy(a) for n, a in PARTS["windows"].operands.items()}
    moved = operands | {"key": part(operands["key"], -1, 1, 15)}
    found, expected = (compiled.results_of(spec, given) for given in (moved, operands))
    assert found is not None and expected is not None
    assert torch.equal(found[0], expected[0])
    assert gpu.places[0][1] != moved["key"].data_ptr()
    assert gpu.places[0][1] % 16 == 0


@pytest.mark.parametrize(("batch", "wider", "fits"), [(2**15, 1, True), (2**16, 1, False), (2**15, 2, False)])
def test_torch_computes_what_indices_do_not_reach(gpu: Emulated, batch: int, wider: int, fits: bool) -> None:
    """Maps of 16 channels; at the batch that fits they have just under 2**31 elements, the wider one that and more."""
    spec = window((63, 65), (9, 13), (0, 0), 2, 8, batch=1).spec
    maps = {n: torch.empty(batch, 63, 65, 16 * wider, device="meta")[..., :16] for n in kernel.MAPS}
    plan = compiled._plan(spec, maps, False)
    assert plan is not None
    assert (plan.kernel is not None) == fits


@pytest.mark.parametrize("step", [48, 33])
def test_parts_that_tensor_cores_cannot_copy_have_the_other_kernel(step: int) -> None:
    """They copy pairs of channels."""
    from tests.cuda.compiling import cuda_target

    operands = {n: torch.from_numpy(a) for n, a in PARTS["windows-half"].operands.items()}
    operands["key"] = part(operands["key"], -1, 0, step - operands["key"].shape[-1])
    wanted = kernel.kernel_of(PARTS["windows-half"].spec, operands, "sm_80")
    assert wanted is not None
    source = gpu_kernel(wanted.request(), cuda_target("sm_80")).script()
    assert ("mma" in source) == (step % 2 == 0)


def test_any_batch_has_the_same_kernel(gpu: Emulated) -> None:
    operands = tensors(CASES["k3"])
    for batch in (1, 2):
        maps = {n: t[:1].repeat(batch, 1, 1, 1) if n in kernel.MAPS else t for n, t in operands.items()}
        found = compiled.results_of(CASES["k3"].spec, maps)
        assert found is not None
        assert found[0].shape[0] == batch
    assert len(gpu.kernels) == 1


def test_nothing_is_loaded_while_a_graph_is_captured(gpu: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, operands = CASES["k3"].spec, tensors(CASES["k3"])
    monkeypatch.setattr(compiled, "_is_capturing", lambda: True)
    assert compiled.results_of(spec, operands) is None
    assert compiled.prepare([(spec, operands)]).kept == 1
    assert compiled.results_of(spec, operands) is None  # loaded, but not yet by the driver
    monkeypatch.setattr(compiled, "_is_capturing", lambda: False)
    assert compiled.results_of(spec, operands) is not None
    monkeypatch.setattr(compiled, "_is_capturing", lambda: True)
    assert compiled.results_of(spec, operands) is not None


LEFT = {
    "double precision": dict.fromkeys(kernel.MAPS, torch.float64),
    "maps of several dtypes": {"query": torch.float16},
}


@pytest.mark.parametrize("why", LEFT)
def test_torch_computes_what_no_kernel_does(gpu: Emulated, why: str) -> None:
    operands = {n: t.to(LEFT[why].get(n, t.dtype)) for n, t in tensors(CASES["k3"]).items()}
    assert compiled.results_of(CASES["k3"].spec, operands) is None
    assert gpu.kernels == []


def test_torch_says_what_is_wrong_with_operands_on_several_devices() -> None:
    operands = operands_of("k3", torch.float16)
    assert kernel.kernel_of(CASES["k3"].spec, operands, "sm_80") is not None
    with FakeTensorMode() as mode:
        apart = {n: mode.from_tensor(t) for n, t in operands.items()}
        apart["query"] = torch.empty(apart["query"].shape, dtype=torch.float16, device="cuda")
    assert kernel.kernel_of(CASES["k3"].spec, apart, "sm_80") is None


def test_bfloat16_is_left_to_torch_before_ampere() -> None:
    operands = operands_of("k3", torch.bfloat16)
    assert kernel.kernel_of(CASES["k3"].spec, operands, "sm_80") is not None
    assert kernel.kernel_of(CASES["k3"].spec, operands, "sm_75") is None


def test_numbers_beyond_a_dtype_are_its_last_and_infinities_stay() -> None:
    term = torch.tensor([-torch.inf, -1e9, 1.0, 1e9])
    assert as_read_by_gpu(CASES["k3"].spec, term, torch.float16).tolist() == [-torch.inf, -65504.0, 1.0, 65504.0]


def test_operands_begin_at_multiples_of_a_word() -> None:
    spec, whole = CASES["k3"].spec, torch.arange(16.0)
    assert as_read_by_gpu(spec, whole, torch.float32) is whole
    moved = as_read_by_gpu(spec, whole[1:], torch.float32)
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, whole[1:])


def test_without_a_compiler_torch_computes_and_one_warning_says_so(gpu: Emulated) -> None:
    gpu.fails = "no CUDA compiler found; install one"
    with pytest.warns(UserWarning, match="computes in torch what its kernels would: no CUDA compiler found") as warned:
        found = [compiled.results_of(CASES[n].spec, tensors(CASES[n])) for n in ("k3", "shifted-with-mask")]
    assert found == [None, None]
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.results_of(CASES["k3"].spec, tensors(CASES["k3"])) is None


def test_launches_leave_the_current_device_as_it_was(gpu: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []

    @contextmanager
    def device_of(tensor: Any) -> Iterator[None]:
        steps.append(len(gpu.calls))
        yield
        steps.append(len(gpu.calls))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    assert compiled.results_of(CASES["k3"].spec, tensors(CASES["k3"])) is not None
    assert steps == [0, 1]


def test_a_launch_that_the_driver_refuses_is_left_to_torch(gpu: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, operands = CASES["k3"].spec, tensors(CASES["k3"])
    expected = compiled.results_of(spec, operands)

    def refuse(*_: Any) -> None:
        raise RuntimeError("stack\nno kernel image is available for execution on the device")

    def load(wanted: Any) -> bool:
        compiled._state.ready[wanted] = compiled.Loaded(refuse, 1)
        return True

    monkeypatch.setattr(compiled, "_state", compiled._State())
    monkeypatch.setattr(compiled, "_load", load)
    compiled.use_kernels(True)
    overload, args, keywords = call(spec, operands)
    with pytest.warns(UserWarning, match="in torch .*: the GPU does not take a kernel: no kernel image is available"):
        found = overload(*args, **keywords)
    assert expected is not None
    assert error(found.numpy(), expected[0].numpy()) <= FLOAT32
    assert compiled.launched_kernels() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.results_of(spec, operands) is None


@pytest.mark.parametrize("missing", ["no CUDA compiler found", "TVM's part for CUDA cannot be loaded"])
def test_no_process_compiles_what_could_not_be_used(
    gpu: Emulated, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def find_compiler() -> None:
        if "compiler" in missing:
            raise CompilerError(missing)

    gpu.fails = "not asked for"
    monkeypatch.setattr(compiled, "_compile", COMPILE)
    monkeypatch.setattr(compiled, "_compile_for", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(cuda_compiler, "find_compiler", find_compiler)
    monkeypatch.setattr(runtime, "load_cuda", lambda: missing)
    with pytest.warns(UserWarning, match=f"its kernels would: {missing}"):
        assert compiled.results_of(CASES["k3"].spec, tensors(CASES["k3"])) is None


def test_kernels_of_a_gpu_are_compiled_side_by_side(gpu: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [kernel.kernel_of(CASES[n].spec, tensors(CASES[n])) for n in ("k3", "shifted-with-mask", "k7")]
    meeting = threading.Barrier(2, timeout=20)

    def compile_for(device: str, group: Any) -> Any:
        assert device == ARCHITECTURE
        meeting.wait()
        return dict.fromkeys(group[1:], "the second of its group")

    monkeypatch.setattr(compiled, "_compile_for", compile_for)
    monkeypatch.setattr(compiled, "_missing_for_cuda", lambda: None)
    monkeypatch.setattr(runtime, "default_threads", lambda: 2)
    assert COMPILE(wanted) == {wanted[2]: "the second of its group"}


def test_what_is_compiled_for_a_gpu_holds_its_machine_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        cuda_compiler.find_compiler()
    except CompilerError as missing:
        pytest.skip(str(missing))
    monkeypatch.setenv("ATTNREWRITE_CACHE", str(tmp_path))
    site = (CASES["k3"].spec, operands_of("k3", torch.float16))
    assert compiled.compile_for("sm_75", [site]) == ()
    (library,) = tmp_path.rglob("*.so")
    content = library.read_bytes()
    assert b"\x04\0\0\0\0\0\0\0cubn" in content
    assert content.count(b"\x7fELF") >= 2  # the library's own, and the GPU's
    monkeypatch.setattr(compiled, "_compile_for", lambda *_: pytest.fail("compiled again"))
    assert compiled.compile_for("sm_75", [site]) == ()
