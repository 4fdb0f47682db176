"""CUDA kernels compile and end up as cubins in the library; without a compiler one sentence says what to install."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

tvm = pytest.importorskip("tvm")

from attnrewrite.errors import CompilerError  # noqa: E402
from attnrewrite.lowering import cuda_compiler  # noqa: E402
from attnrewrite.lowering.cuda_resources import KernelResources  # noqa: E402
from tests.metal.cases import SLIDES, WINDOWS, Case  # noqa: E402
from tests.metal.test_kernels import CUDA, kernel, symbol  # noqa: E402

KERNELS: dict[str, Case] = {
    **{f"window-{name}": WINDOWS[name] for name in ("shifted", "half", "keys-in-tiles", "extra-queries")},
    **{
        f"slide-{name}": SLIDES[name]
        for name in ("k3", "k3-half", "k7-dilated", "learned-k3", "slots-in-groups", "overlap-add-half")
    },
}


@pytest.fixture(scope="module")
def compiler() -> cuda_compiler.CudaCompiler:
    try:
        return cuda_compiler.find_compiler()
    except CompilerError as error:
        pytest.skip(str(error))


def module(cases: dict[str, Case]) -> Any:
    return tvm.IRModule({symbol(name): kernel(case, CUDA, symbol(name)) for name, case in cases.items()})


def test_kernels_become_a_cubin_in_the_library(compiler: cuda_compiler.CudaCompiler, tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    with cuda_compiler.embedded_cubins(["sm_90"], compiler) as embedded:
        built = tvm.tirx.build(module(KERNELS), CUDA.with_host(tvm.target.Target("llvm")))
    built.export_library(str(library), fcompile=link)
    embedded.finish(library)
    (cubin,) = embedded.cubins
    content = library.read_bytes()
    assert cubin.startswith(b"\x7fELF")
    assert all(symbol(name).encode() in cubin for name in KERNELS)
    assert [k.name for k in embedded.kernels if k.spills] == []
    assert len(embedded.kernels) == len(KERNELS)
    # The format word of the module that holds the cubin no longer says that it is source.
    head = content[: content.index(cubin)]
    assert re.findall(rb"\x04\x00{7}(cuda|cubn)", head)[-1] == b"cubn"


def test_code_for_several_architectures_is_a_fat_binary(compiler: cuda_compiler.CudaCompiler) -> None:
    compiled = compiler.compile(DOUBLE, ("sm_75", "sm_90"))
    assert compiled.code[:4] == FAT_BINARY
    assert [(k.name, k.arch, k.spills) for k in compiled.kernels] == [
        ("double_it", "sm_75", False),
        ("double_it", "sm_90", False),
    ]
    assert 4 < compiled.kernels[0].registers < 32


DOUBLE = 'extern "C" __global__ void double_it(float* x) { x[threadIdx.x] *= 2.0f; }'
FAT_BINARY = bytes.fromhex("50ed55ba")


def test_a_kernel_that_spills_is_compiled_for_fewer_blocks_at_once() -> None:
    given = []

    class Spilling:
        def compile(self, source: str, architectures: Sequence[str]) -> cuda_compiler.Compiled:
            given.append(source)
            spilled = 8 if len(given) == 1 else 0
            kernels = [KernelResources(name, "sm_90", 80, spilled * (name == "b"), 0, 0, 0) for name in "ab"]
            return cuda_compiler.Compiled(b"", tuple(kernels))

    source = "void __launch_bounds__(64) a(); void __launch_bounds__(96) b();"
    assert not any(k.spills for k in cuda_compiler._without_spills(Spilling(), source, ["sm_90"]).kernels)
    assert given == [source, source.replace("(96)", "(96, 1)")]


def test_nvrtc_alone_makes_code_for_one_architecture(tmp_path: Path) -> None:
    nvrtc = cuda_compiler.Nvrtc(tmp_path / "libnvrtc.so.13", ())
    with pytest.raises(CompilerError, match=r"for several architectures; name one, .* pip install nvidia-nvfatbin"):
        nvrtc._joined([("75", b""), ("90", b"")], ("90", b""))


def link(output: str, objects: list[str], *_: Any, **__: Any) -> None:
    subprocess.run([sys.executable, "-m", "ziglang", "cc", "-shared", "-o", output, *objects], check=True)


def test_a_library_without_the_kernels_is_an_error(tmp_path: Path) -> None:
    library = tmp_path / "other.so"
    library.write_bytes(b"\x7fELF" + bytes(100))
    embedded = cuda_compiler.EmbeddedCubins([b"\x7fELFkernels"])
    with pytest.raises(CompilerError, match=r"other\.so does not hold its CUDA kernels"):
        embedded.finish(library)


def test_an_unknown_architecture_is_one_sentence(compiler: cuda_compiler.CudaCompiler) -> None:
    with (
        pytest.raises(CompilerError, match="failed for sm_12345: ") as error,
        cuda_compiler.embedded_cubins(["sm_12345"], compiler),
    ):
        tvm.tirx.build(module({"k3": SLIDES["k3"]}), CUDA)
    assert "\n" not in str(error.value)


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr(cuda_compiler, "_DEFAULT_TOOLKIT", tmp_path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(CompilerError, match=r"no CUDA compiler found; install .* pip install nvidia-cuda-nvrtc"):
        cuda_compiler.find_compiler()


def test_compilers_are_found_where_they_are_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    monkeypatch.setattr(cuda_compiler, "_DEFAULT_TOOLKIT", tmp_path / "nothing")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    package = tmp_path / "site" / "nvidia" / "cu13"
    (package / "lib").mkdir(parents=True)
    (package / "include").mkdir()
    (package / "lib" / "libnvrtc.so.13").touch()
    found = cuda_compiler.find_compiler()
    assert found == cuda_compiler.Nvrtc(package / "lib" / "libnvrtc.so.13", (package / "include",))

    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert cuda_compiler.find_compiler() == cuda_compiler.Nvcc(toolkit / "bin" / "nvcc")
