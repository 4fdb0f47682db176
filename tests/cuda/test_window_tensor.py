"""The tensor-core kernel of FlashWindowAttention: run in the emulator against the reference, compiled by nvcc."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from attnrewrite.emulator import MetalDevice, metal_device, metal_target, run_function  # noqa: E402
from attnrewrite.lowering import build, importer, limits  # noqa: E402
from attnrewrite.lowering.cuda_compiler import Compiled, embedded_cubins  # noqa: E402
from attnrewrite.lowering.kernels import gpu_builder, reference, tensor_softmax, window_tensor  # noqa: E402
from attnrewrite.lowering.kernels.gpu_builder import Limits, Operands  # noqa: E402
from attnrewrite.lowering.kernels.tensor_core import TensorCore  # noqa: E402
from attnrewrite.lowering.kernels.window_tensor_plan import takes, tiling_of  # noqa: E402
from attnrewrite.lowering.targets import CUDA_PRESETS, parse_target  # noqa: E402
from benchmarks.metal_traffic import op_row  # noqa: E402
from tests.cuda.compiling import cuda_target, resources  # noqa: E402
from tests.cuda.emulating import ROUNDOFF  # noqa: E402
from tests.metal.cases import HALO, WINDOWS, Case, window  # noqa: E402

NUMPY_TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Library = tuple[MetalDevice, Any]
"""The emulated device, and the module of all kernels in CASES."""

CASES = {
    name: WINDOWS[name]
    for name in (
        "shifted", "padded-then-shifted", "shifted-then-padded", "mask-tensor", "keys-in-tiles", "halo", "shared-query",
        "shifts-of-heads", "heads-of-64-half", "logit-bias", "relative", "relative-half",
    )
}  # fmt: skip


def in_dtype(case: Case, dtype: str) -> Case:
    operands = {name: value.astype(NUMPY_TYPES[dtype]) for name, value in case.operands.items()}
    return Case(case.spec, operands, case.symbolic)


def operands_of(case: Case, **more: Mapping[str, Any]) -> Operands:
    return Operands(case.shapes(tvm.tirx.Var("n", "int64")), str(case.operands["query"].dtype), **more)


def kernel(case: Case, target: tvm.target.Target, name: str = "run", **dtypes: str) -> tvm.tirx.PrimFunc:
    return window_tensor.flash_window_attention(case.spec, operands_of(case, dtypes=dtypes), target, name)


def error(case: Case, output: np.ndarray) -> float:
    """The largest, of what may be: weights are rounded once, which moves a result by that much of the largest value;
    and the result is rounded.
    """
    exact = {name: value.astype(np.float64) for name, value in case.operands.items()}
    expected = reference.flash_window_attention(case.spec, exact)
    bound = ROUNDOFF[str(output.dtype)] * (np.abs(exact["value"]).max() + np.abs(expected).max())
    return float(np.abs(output.astype(np.float64) - expected).max() / bound)


def output_shape(case: Case) -> tuple[int, ...]:
    value = case.operands["value"]
    return value.shape[0], *case.spec.geometry.feature_size, value.shape[-1]


def run(case: Case, **dtypes: str) -> tuple[np.ndarray, tuple[str, ...]]:
    function = kernel(case, metal_target(), **dtypes)
    outputs = [(output_shape(case), str(case.operands["value"].dtype))]
    done = run_function(function, list(case.operands.values()), outputs)
    return done.outputs[0], done.findings


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    """All kernels, compiled together."""
    target = metal_target()
    with metal_device(recording=True) as device:
        cases = {symbol(name): in_dtype(case, "float16") for name, case in CASES.items()}
        functions = {name: kernel(case, target, name) for name, case in cases.items()}
        yield device, tvm.tirx.build(tvm.IRModule(functions), target=target, pipeline=limits.PIPELINE)


def symbol(name: str) -> str:
    return f"kernel_{name.replace('-', '_')}"


def run_of(library: Library, name: str, case: Case) -> tuple[np.ndarray, tuple[str, ...]]:
    """Of the kernel for CASES[name]."""
    device, module = library
    output = tvm.runtime.empty(output_shape(case), "float16", tvm.metal())
    device.clear()
    module[symbol(name)](*(tvm.runtime.tensor(o, tvm.metal()) for o in case.operands.values()), output)
    return output.numpy(), device.findings


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_its_reference(library: Library, name: str) -> None:
    case = in_dtype(CASES[name], "float16")
    output, findings = run_of(library, name, case)
    assert findings == ()
    assert error(case, output) <= 1


RUN = window((26, 28), (4, 4), (1, 2), 2, 6, bias="shared", mask_value=-100.0, padding=True, symbolic=True)


@pytest.mark.parametrize("bias", ["float16", "float32"])
def test_windows_in_a_row_share_a_bias(monkeypatch: pytest.MonkeyPatch, bias: str) -> None:
    """98 windows, of a batch that is known when they run: three by three, so that the last threadgroup has two."""
    monkeypatch.setattr(gpu_builder, "WAVES", 1)
    assert Limits.of(metal_target()).run(98, 5) == 3
    case = in_dtype(RUN, "float16")
    case.operands["bias"] = RUN.operands["bias"].astype(bias)
    output, findings = run(case, bias=bias)
    assert findings == ()
    assert error(case, output) <= 1


@pytest.mark.parametrize("name", ["shifted", "heads-of-64-half", "padded-then-shifted"])
def test_parts_of_wider_maps(name: str) -> None:
    """All that lies between their pixels is NaN. Copies of the key's are narrower than those of query and value."""
    case = in_dtype(CASES[name], "float16")
    steps = {"key": case.operands["key"].shape[-1] + 2, "value": 3 * case.operands["value"].shape[-1]}
    operands = dict(case.operands)
    for operand, step in steps.items():
        *pixels, channels = operands[operand].shape
        wider = np.full((*pixels, step), np.nan, np.float16)
        wider[..., :channels] = operands[operand]
        operands[operand] = wider.reshape(-1)[: channels - step]
    function = window_tensor.flash_window_attention(case.spec, operands_of(case, steps=steps), metal_target(), "run")
    done = run_function(function, list(operands.values()), [(output_shape(case), "float16")])
    assert done.findings == ()
    assert error(case, done.outputs[0]) <= 1


def test_bfloat16() -> None:
    case = in_dtype(window((11, 15), (4, 5), (0, 0), 1, 24, 40, bias="own", keys=HALO, batch=1), "bfloat16")
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def test_a_row_that_is_masked_altogether_gives_nan(library: Library) -> None:
    case = in_dtype(WINDOWS["mask-tensor"], "float16")
    case.operands["mask"][2, 5] = -np.inf
    output, _ = run_of(library, "mask-tensor", case)
    expected = reference.flash_window_attention(case.spec, case.operands)
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(np.isnan(output), np.isnan(expected))


def test_a_row_without_a_key_in_its_first_tile() -> None:
    """Of 100 keys, which are two tiles at least."""
    case = in_dtype(window((10, 10), (10, 10), (0, 0), 1, 16, batch=1, mask=True), "float16")
    case.operands["mask"][0, 7, :64] = -np.inf
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def test_a_row_of_the_least_number_is_a_mean() -> None:
    """As libraries mask that know no infinity: such a row has equal logits."""
    case = in_dtype(WINDOWS["mask-tensor"], "bfloat16")
    case.operands["mask"][2, 5] = ml_dtypes.finfo(ml_dtypes.bfloat16).min
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


@pytest.mark.parametrize("name", ["mask-tensor", "heads-of-64-half"])
def test_large_logits_do_not_overflow(library: Library, name: str) -> None:
    """Whole numbers, so that logits of many thousands are exact; in one tile of keys, and in several."""
    case = in_dtype(WINDOWS[name], "float16")
    for operand in ("query", "key"):
        case.operands[operand][:] = np.round(case.operands[operand] * 40)
    output, findings = run_of(library, name, case)
    assert findings == ()
    assert error(case, output) <= 1


# Two warps of 20 tokens; 24 channels end within a step of 16; one window is fetched while the other is computed.
SMALL = window((8, 10), (4, 5), (2, 0), 1, 24, bias="shared", mask_value=-100.0, batch=1)


def not_transposed(self: TensorCore, target: Any, row: Any, count: int, *, transposed: bool = False) -> None:
    self._do(f"load_matrices_{count}", target, row)


def half_of_a_row(*arguments: Any, lanes: int) -> None:
    gpu_builder.combine_lanes(*arguments, lanes=lanes // 2)


def rows_exchanged(self: Any, half: int) -> Any:
    return self.first_query + self.own_row + self.frame.thread_x // 4 + (1 - half) * 8


FAULTS = {
    "": (window_tensor, "choose_run", lambda *_: 2),
    "values as columns": (TensorCore, "load_matrices", not_transposed),
    "nothing waited for": (TensorCore, "wait", lambda self, pending: None),
    "no barriers": (window_tensor, "barrier", lambda: None),
    "pieces of rows not gathered": (TensorCore, "transpose_quad", lambda self, words: None),
    "maxima of two lanes": (tensor_softmax, "combine_lanes", half_of_a_row),
    "rows 8 apart exchanged": (window_tensor._TensorKernel, "query_token", rows_exchanged),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(window_tensor, "choose_run", lambda *_: 2)
    monkeypatch.setattr(*FAULTS[fault])
    case = in_dtype(SMALL, "float16")
    output, findings = run(case)
    assert (findings == () and error(case, output) <= 1) == (fault == "")


def takes_case(case: Case, dtype: str, chip: str) -> bool:
    shapes = {name: operand.shape for name, operand in case.operands.items()}
    return takes(case.spec, shapes, dtype, cuda_target(chip))


def test_what_it_takes_and_what_not() -> None:
    plain = WINDOWS["shifted"]
    assert takes_case(plain, "float16", "sm_75")
    assert takes_case(plain, "bfloat16", "sm_80")
    assert not takes_case(plain, "float32", "sm_90")  # would not be exact
    assert not takes_case(plain, "bfloat16", "sm_75")  # its tensor cores do not multiply it
    assert not takes_case(plain, "float16", "sm_70")  # other matrix instructions
    assert not takes_case(window((8, 8), (4, 4), (0, 0), 2, 5), "float16", "sm_90")  # heads begin at odd channels
    assert not takes_case(WINDOWS["channels-in-chunks"], "float16", "sm_90")  # 130 channels
    assert not takes_case(WINDOWS["relative-pairs"], "float16", "sm_90")  # a table row for each logit
    assert not takes_case(WINDOWS["extra-keys"], "float16", "sm_90")  # operands that only window_gpu has
    shapes = {name: operand.shape for name, operand in plain.operands.items()}
    assert not takes(plain.spec, shapes, "float16", metal_target())


class Source:
    """A compiler that keeps what it is given."""

    text = ""

    def compile(self, source: str, _: Any) -> Compiled:
        self.text = source
        return Compiled(b"none", ())


@pytest.mark.parametrize(("dtype", "on_tensor_cores"), [("float16", True), ("float32", False)])
def test_models_in_half_precision_get_this_kernel(dtype: str, on_tensor_cores: bool) -> None:
    case = WINDOWS["shifted"]
    model = op_row("row", case.spec, {n: a.astype(dtype) for n, a in case.operands.items()}).model
    target, kept = parse_target("cuda:sm_80"), Source()
    tvm_target = build.tvm_target(target)
    with embedded_cubins(target.architectures, kept):
        build.build(importer.import_onnx(model, target, tvm_target), tvm_target)
    assert ("attnrewrite_mma_float16" in kept.text) == on_tensor_cores


@pytest.mark.parametrize("head_dim", [6, 16, 30, 32, 64, 128])
def test_tilings_keep_to_the_limits(head_dim: int) -> None:
    for (target, shared), side, heads in itertools.product(
        ((metal_target(), 32768), (cuda_target("sm_75"), 49152)), (4, 7, 8, 10, 12, 14, 16, 24), (1, 3, 4)
    ):
        spec = window((side, side), (side, side), (0, 0), heads, head_dim, batch=1).spec
        shapes = dict.fromkeys(("query", "key", "value"), (1, side, side, heads * head_dim))
        tiling = tiling_of(spec, shapes, "float16", target)
        assert tiling is not None
        assert tiling.shared_bytes <= shared
        assert math.prod(tiling.threads) <= 256
        assert heads % tiling.heads == 0
        # 7 x 7 tokens are padded to 64, which makes 1.7 times as many products.
        assert side < 7 or tiling.padded_products() <= 1.75 * side**4


def compiled(size: int, heads: int, head_dim: int, *chips: str, **more: Any) -> list[Any]:
    """A kernel for 8 x 8 windows of a large batch."""
    case = in_dtype(window((8 * size,) * 2, (size,) * 2, (size // 2,) * 2, heads, head_dim, batch=1, **more), "float16")
    shapes = {
        name: (64, *o.shape[1:]) if name in ("query", "key", "value") else o.shape for name, o in case.operands.items()
    }
    given = Operands(shapes, "float16")
    return resources(window_tensor.flash_window_attention(case.spec, given, cuda_target(chips[0]), "run"), *chips)


def test_it_compiles_without_spills() -> None:
    kernels = compiled(7, 4, 32, "sm_75", "sm_90", bias="shared", mask_value=-100.0)
    assert [kernel.arch for kernel in kernels] == ["sm_75", "sm_90"]
    assert not any(kernel.spills for kernel in kernels)
    # Three threadgroups of 128 threads on a multiprocessor, by registers (64 K) and shared memory (64 KB on sm_75).
    assert all(kernel.registers <= 168 and kernel.shared_bytes <= 65536 // 3 for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 7, 8, 12, 14, 16, 24])
@pytest.mark.parametrize("head_dim", [6, 16, 30, 32, 64, 128])
def test_no_geometry_spills_on_any_preset(size: int, head_dim: int) -> None:
    kernels = compiled(size, 4, head_dim, *CUDA_PRESETS, bias="shared", mask_value=-100.0)
    assert [kernel.arch for kernel in kernels] == list(CUDA_PRESETS)
    assert [kernel for kernel in kernels if kernel.spills] == []
