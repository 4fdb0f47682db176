"""The kernels that CUDA shares with Metal, with CUDA's tiles and exponential: run in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

tvm = pytest.importorskip("tvm")

from attnrewrite.emulator import MetalDevice, metal_device  # noqa: E402
from attnrewrite.lowering.kernels import slide_gpu, window_gpu  # noqa: E402
from attnrewrite.lowering.kernels.gpu_builder import Limits  # noqa: E402
from attnrewrite.lowering.kernels.tensor_core import TensorCore  # noqa: E402
from tests.cuda.compiling import cuda_target  # noqa: E402
from tests.cuda.emulating import allow_memory_of_cuda  # noqa: E402
from tests.metal.cases import SLIDES, WINDOWS, slide, window  # noqa: E402
from tests.metal.test_kernels import check, emulated  # noqa: E402

CASES = {
    "window-7-shifted": WINDOWS["shifted"],
    "window-8": window((16, 8), (8, 8), (4, 0), 2, 32, bias="shared", mask_value=-100.0, symbolic=True),
    # Runs of five images, found at run time, of which the last is shorter.
    "window-8-of-seven-images": window((8, 8), (8, 8), (0, 0), 2, 32, bias="shared", batch=7, symbolic=True),
    "window-16": window((16, 16), (16, 16), (0, 0), 1, 32, bias="shared", batch=1),
    "slide-7": slide((16, 20), (7, 7), (1, 1), 2, 8, bias=True, batch=1),
    "slide-9": slide((9, 12), (9, 9), (1, 1), 1, 4, bias=True, batch=2, symbolic=True),
    "slide-exclude": SLIDES["exclude"],
}


@pytest.fixture(scope="module")
def on_cuda() -> Iterator[tuple[MetalDevice, Any]]:
    """The emulated device, and the module of all kernels."""
    # One threadgroup keeps this GPU busy, so that a thread has as much to do as on large maps.
    of_cuda = replace(Limits.of(cuda_target("sm_90")), in_flight=1)
    with pytest.MonkeyPatch.context() as patch, metal_device(recording=True) as device:
        allow_memory_of_cuda(patch)
        patch.setattr(Limits, "of", lambda _: of_cuda)
        for kernels in (window_gpu, slide_gpu):
            patch.setattr(kernels, "exponential", lambda target: TensorCore(target, "float16").exponential)
        yield device, emulated(CASES)


@pytest.mark.parametrize("name", CASES)
def test_kernel_computes_its_reference(on_cuda: tuple[MetalDevice, Any], name: str) -> None:
    check(*on_cuda, name, CASES[name])
