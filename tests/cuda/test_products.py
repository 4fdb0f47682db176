"""Products and convolutions on tensor cores: executed in the emulator, and compiled for the shapes of models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tvm_ffi

tvm = pytest.importorskip("tvm")

from attnrewrite.emulator import metal_target  # noqa: E402
from attnrewrite.lowering import build  # noqa: E402
from attnrewrite.lowering.limits import threads_of  # noqa: E402
from attnrewrite.lowering.schedules import gpu, gpu_emit, gpu_tensor_core  # noqa: E402
from tests.cuda.compiling import cuda_target, resources  # noqa: E402
from tests.metal import test_schedules  # noqa: E402

METAL = gpu_emit.Device.of(metal_target())


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The emulator takes the place of a CUDA device, within Metal's limits. Gives what was emitted for tensor cores."""
    device = replace(METAL, target=cuda_target("sm_80"))
    monkeypatch.setattr(gpu_emit.Device, "of", lambda target: device)
    emitted: list[Any] = []
    own = gpu_tensor_core.TensorCoreProduct.emit
    monkeypatch.setattr(
        gpu_tensor_core.TensorCoreProduct, "emit", lambda self, *at: (emitted.append(self), own(self, *at))
    )
    return emitted


# Of different layouts of both operands, edges in every direction, epilogues and depths.
CASES = [
    "matmul",
    "matmul-in-vectors",
    "matmul-transposed",
    "matmul-transposed-in-vectors",
    "matmul-of-heads",
    "matmul-symbolic-rows",
    "matmul-bias-residual",
    "conv-patch-embed",
    "conv-padded",
    "conv-1x1",
]


@pytest.mark.parametrize("name", CASES)
def test_products_keep_the_numbers(name: str, tensor_cores: list[Any]) -> None:
    test_schedules.compare(name, "float16", test_schedules.FLOAT16)
    assert tensor_cores


def test_warps_share_a_long_reduction(tensor_cores: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compute = test_schedules.CASES["matmul-bias-residual"][1]
    monkeypatch.setitem(test_schedules.CASES, "long", ([(1, 20, 1030), (1030, 24), (24,), (1, 20, 24)], compute))
    test_schedules.compare("long", "float16", test_schedules.FLOAT16)
    (product,) = tensor_cores
    assert product.tile.groups_z > 1


@pytest.mark.parametrize(("chip", "dtype", "sizes"), [
    ("sm_80", "float32", (64, 64, 64)),  # exact: never rounded to fewer bits
    ("sm_70", "float16", (64, 64, 64)),  # the chip has other instructions
    ("sm_80", "float16", (7, 64, 64)),  # mostly padding
    ("sm_80", "float16", (64, 15, 64)),
], ids=str)  # fmt: skip
def test_what_tensor_cores_do_not_take(chip: str, dtype: str, sizes: tuple[int, int, int]) -> None:
    assert "mma" not in str(scheduled(cuda_target(chip), *sizes, dtype))


def test_a_symbolic_batch_is_divided_by_nothing() -> None:
    """A GPU takes some dozens of instructions to divide by a number of 64 bits that is not known before."""
    kernel = scheduled(cuda_target("sm_80"), 49, 96, 288, batch=tvm.tirx.Var("n", "int64"))
    divisors: list[Any] = []
    for kind in (tvm.tirx.FloorDiv, tvm.tirx.FloorMod):
        inside = kernel.body.body  # the extent of the grid is computed by the host, once
        tvm_ffi.structural_walk(inside, (kind, lambda division: divisors.append(division.b)))
    assert len(divisors) > 10
    assert [divisor for divisor in divisors if not isinstance(divisor, tvm.tirx.IntImm)] == []


def scheduled(target: Any, rows: int, depth: int, columns: int, dtype: str = "float16", batch: Any = 1) -> Any:
    """The kernel of a linear layer with bias and residual."""
    shapes = [(batch, rows, depth), (depth, columns), (columns,), (batch, rows, columns)]
    module = test_schedules.relax_module(shapes, test_schedules.CASES["matmul-bias-residual"][1], dtype)
    fused = gpu.schedule(build.fuse(module, target), target)
    (kernel,) = (function for function in fused.functions.values() if isinstance(function, tvm.tirx.PrimFunc))
    return kernel.with_attr("global_symbol", "run")


# Of Swin-T at batch 1 and 32: the smallest and the largest tiles.
LAYERS = [(49, 768, 768), (3136, 96, 288), (6272, 384, 1536), (100352, 96, 288)]
REGISTERS = 65536  # of a multiprocessor
# Made for the first of them, and compiled for all.
QUICK, TURING, AMPERE = ("sm_80", "sm_90"), ("sm_75", "sm_86", "sm_90"), ("sm_80", "sm_86", "sm_89", "sm_90")
SLOW = [pytest.param(layer, chips, marks=pytest.mark.slow) for layer in LAYERS for chips in (TURING, AMPERE)]


@pytest.mark.parametrize(("layer", "chips"), [(LAYERS[0], QUICK), *SLOW], ids=str)
def test_layers_compile_without_spills(layer: tuple[int, int, int], chips: tuple[str, ...]) -> None:
    function = scheduled(cuda_target(chips[0]), *layer)
    kernels = resources(function, *chips)
    assert [kernel.arch for kernel in kernels] == list(chips)
    for kernel in kernels:
        assert not kernel.spills
        assert kernel.stack_bytes == 0
        if chips != TURING:  # which copies through registers
            assert 2 * threads_of(function) * kernel.registers <= REGISTERS


def test_bfloat16_compiles() -> None:
    """Numbers: the instructions' own, in test_tensor_core.py; the rest is what float16 has."""
    function = scheduled(cuda_target("sm_80"), 100, 96, 288, "bfloat16")
    assert "mma_bfloat16" in str(function)
    assert [kernel.spills for kernel in resources(function, "sm_80")] == [False]
