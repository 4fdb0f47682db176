"""The table of kernels lists what the compiler says of them, and fails where one spills."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("tvm")

from attnrewrite.errors import CompilerError
from attnrewrite.lowering.cuda_compiler import find_compiler
from attnrewrite.lowering.cuda_resources import KernelResources
from attnrewrite.lowering.targets import CUDA_PRESETS
from benchmarks import cuda_kernels


@pytest.fixture
def nvcc() -> Iterator[None]:
    try:
        find_compiler()
    except CompilerError as error:
        pytest.skip(str(error))
    return


def test_rows_are_chosen_by_the_beginnings_of_their_names() -> None:
    names = list(cuda_kernels.models(["slide-", "tried-slide-k7-d"], "float16"))
    assert {"slide-3", "slide-7", "tried-slide-k7-dilated"} <= set(names)
    assert all(name.startswith(("slide-", "tried-slide-k7-d")) for name in names)


@pytest.mark.usefixtures("nvcc")
def test_an_op_is_one_kernel_and_so_is_a_linear_layer(capsys: pytest.CaptureFixture[str]) -> None:
    cuda_kernels.main(["tried-slide-one-axis", "gemm-49x768x768", "--presets", "sm_75", "--half"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1].split("_")[0] for line in lines[2:]] == ["fused", "slide"]


def test_a_kernel_that_spills_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = KernelResources("attend", "sm_75", 255, 8, 16, 8, 2048)
    monkeypatch.setattr(cuda_kernels, "compile_kernels", lambda model, preset: (spilling,))
    with pytest.raises(SystemExit, match="1 of 1 kernels spill registers: slide-3/attend"):
        cuda_kernels.main(["slide-3"])
    (kernel,) = cuda_kernels.kernels_of("row", None, ["sm_75"])
    assert cuda_kernels.cells(kernel, ["sm_75", "sm_90"]) == ["row", "attend", "2.0", "255 (spills 8, 16)", ""]


@pytest.mark.slow
@pytest.mark.usefixtures("nvcc")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("row", cuda_kernels.rows())
def test_every_geometry_compiles_for_the_oldest_and_the_newest_gpu_without_spills(row: str, dtype: str) -> None:
    kernels = cuda_kernels.kernels_of(row, cuda_kernels.rows()[row](dtype), (CUDA_PRESETS[0], CUDA_PRESETS[-1]))
    assert kernels
    assert [k.name for k in kernels for r in k.resources.values() if r.spills] == []
