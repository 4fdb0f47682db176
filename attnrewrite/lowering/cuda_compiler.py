"""CUDA kernels become machine code here: nvcc or NVRTC is found, run, and its cubin put into the library.

TVM writes CUDA source. Where it has no CUDA runtime at hand it would leave that source in the library, to be compiled
on the device by whatever is installed there. So the source is compiled while the library is built: `embedded_cubins`
answers TVM's last call before it packs the source with machine code in its place (a cubin, or a fat binary), and
`finish` corrects the one word in the linked library that still calls it source. What comes out is what TVM writes on a
machine with a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from attnrewrite.errors import CompilerError, first_error
from attnrewrite.lowering.cuda_resources import KernelResources, read_resources
from attnrewrite.lowering.registered import registered

_POSTPROCESS = "tvm_callback_cuda_postproc"
_FORCE_PACKING = "TVM_COMPILE_FORCE_FALLBACK"  # TVM packs what it is given instead of loading it into a driver
_TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
_DEFAULT_TOOLKIT = Path("/usr/local/cuda")
_INSTALL_HINT = (
    "install the CUDA toolkit (nvcc on PATH, or CUDA_HOME set), "
    "or run: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"
)


@dataclass(frozen=True)
class Compiled:
    """code: a cubin, or a fat binary where it is for several architectures. kernels: of each of these."""

    code: bytes
    kernels: tuple[KernelResources, ...]


class CudaCompiler(Protocol):
    """Compiles CUDA source text for `architectures` (as in sm_90), ascending.

    For one it gives a cubin. For several it gives a fat binary: a cubin of each, and PTX of the last, from which the
    driver compiles for GPUs that came later. Raises CompilerError with the compiler's words.
    """

    def compile(self, source: str, architectures: Sequence[str]) -> Compiled: ...


def toolkits() -> list[Path]:
    """Where the CUDA toolkit may be."""
    return [Path(os.environ[v]) for v in _TOOLKIT_VARIABLES if os.environ.get(v)] + [_DEFAULT_TOOLKIT]


def find_compiler() -> CudaCompiler:
    """nvcc from PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda; otherwise NVRTC from there or from its pip package.

    Raises CompilerError that says what to install where there is neither.
    """
    on_path = shutil.which("nvcc")
    for nvcc in [Path(on_path)] if on_path else [t / "bin" / "nvcc" for t in toolkits()]:
        if os.access(nvcc, os.X_OK):
            return Nvcc(nvcc)
    packages = [p for entry in sys.path for p in (Path(entry) / "nvidia").glob("*") if p.is_dir()]
    for folder in [*packages, *toolkits()]:
        for library in sorted([*folder.glob("lib/libnvrtc.so.*"), *folder.glob("lib64/libnvrtc.so.*")]):
            if "alt" not in library.name:
                return Nvrtc(
                    library, tuple(p / "include" for p in (*packages, *toolkits()) if (p / "include").is_dir())
                )
    raise CompilerError(f"no CUDA compiler found; {_INSTALL_HINT}")


@dataclass(frozen=True)
class Nvcc:
    """The compiler driver of the CUDA toolkit; it needs a host C++ compiler, too."""

    path: Path

    def compile(self, source: str, architectures: Sequence[str]) -> Compiled:
        with tempfile.TemporaryDirectory() as folder:
            text, code = Path(folder, "kernels.cu"), Path(folder, "kernels.bin")
            text.write_text(source)
            command = [str(self.path), *_nvcc_output(architectures), "-O3", "-w", "-Xptxas", "-v"]
            run = subprocess.run([*command, str(text), "-o", str(code)], capture_output=True, text=True, check=False)
            if run.returncode:
                raise CompilerError(f"nvcc failed for {', '.join(architectures)}: {first_error(run.stderr)}")
            return Compiled(code.read_bytes(), read_resources(run.stderr))


def _nvcc_output(architectures: Sequence[str]) -> list[str]:
    if len(architectures) == 1:
        return ["-cubin", f"-arch={architectures[0]}"]
    newest = _virtual(architectures[-1])
    pairs = [(_virtual(arch), arch) for arch in architectures] + [(newest, newest)]
    return ["-fatbin", *(f"-gencode=arch={virtual},code={real}" for virtual, real in pairs)]


def _virtual(arch: str) -> str:
    """The instruction set of PTX that an architecture is compiled from."""
    return arch.replace("sm_", "compute_")


@dataclass(frozen=True)
class Nvrtc:
    """The compiler as a library: device code only, no host compiler needed. include: where cuda_fp16.h may be."""

    library: Path
    include: tuple[Path, ...]

    # What TVM's source includes from the C++ standard library under NVRTC, without the headers it would take them from.
    _PRELUDE = (
        "typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;\n"
        "typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;\n"
        "typedef unsigned long long uint64_t;\n"
    )
    _STANDARD_HEADERS = re.compile(r"#ifdef __CUDACC_RTC__\n.*?#else\n.*?#include <cuda\.h>\n#endif\n", re.DOTALL)

    def compile(self, source: str, architectures: Sequence[str]) -> Compiled:
        nvrtc = self._load()
        results = [self._compile(nvrtc, source, arch) for arch in architectures]
        kernels = tuple(kernel for _, log in results for kernel in read_resources(log))
        if len(results) == 1:
            return Compiled(results[0][0], kernels)
        newest = architectures[-1].removeprefix("sm_")
        ptx, _ = self._compile(nvrtc, source, _virtual(architectures[-1]))
        parts = [(arch.removeprefix("sm_"), code) for arch, (code, _) in zip(architectures, results, strict=True)]
        return Compiled(self._joined(parts, (newest, ptx)), kernels)

    def _load(self) -> Any:
        try:
            # NVRTC opens its builtins by name alone, which finds them only where they are loaded already.
            for builtins in sorted(self.library.parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(self.library))
        except OSError as error:
            raise CompilerError(f"{self.library} cannot be loaded ({error}); {_INSTALL_HINT}") from None

    def _compile(self, nvrtc: Any, source: str, arch: str) -> tuple[bytes, str]:
        """A cubin, or the PTX of a virtual architecture; and the log."""
        text = self._PRELUDE + self._STANDARD_HEADERS.sub("", source, count=1)
        options = [f"--gpu-architecture={arch}", "-default-device", "-w", "--ptxas-options=-v"]
        options += [f"-I{p}" for p in self.include]
        program = ctypes.c_void_p()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
        try:
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
            log = _fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
            if failed:
                raise CompilerError(f"NVRTC failed for {arch}: {first_error(log)}")
            if arch.startswith("compute_"):
                return _fetch(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program), log
            return _fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def _joined(self, cubins: Sequence[tuple[str, bytes]], ptx: tuple[str, bytes]) -> bytes:
        """A fat binary of the code for each architecture, which is named by its number alone."""
        libraries = sorted(self.library.parent.glob("libnvfatbin.so.*"))
        if not libraries:
            raise CompilerError(
                "NVRTC alone makes no code for several architectures; name one, or install nvcc, "
                "or run: pip install nvidia-nvfatbin"
            )
        fatbin, handle = ctypes.CDLL(str(libraries[0])), ctypes.c_void_p()
        options = (ctypes.c_char_p * 1)(b"-64")
        size = ctypes.c_size_t
        results = [fatbin.nvFatbinCreate(ctypes.byref(handle), options, size(1))]
        try:
            for arch, code in cubins:
                results.append(fatbin.nvFatbinAddCubin(handle, code, size(len(code)), arch.encode(), b"kernels"))
            arch, code = ptx
            results.append(fatbin.nvFatbinAddPTX(handle, code, size(len(code)), arch.encode(), b"kernels", None))
            if any(results):
                raise CompilerError(f"{libraries[0].name} cannot join code for several architectures: {results}")
            return _fetch(fatbin.nvFatbinSize, fatbin.nvFatbinGet, handle)
        finally:
            fatbin.nvFatbinDestroy(ctypes.byref(handle))


def _fetch(size_of: Any, copy: Any, program: ctypes.c_void_p) -> bytes:
    """What these libraries hand out in two calls: the size, then the bytes."""
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    copy(program, buffer)
    return buffer.raw


@dataclass
class EmbeddedCubins:
    """The code of one build, in the order TVM asked for it; the kernels in it, by architecture."""

    cubins: list[bytes] = field(default_factory=list)
    kernels: list[KernelResources] = field(default_factory=list)
    error: CompilerError | None = None

    def finish(self, library: Path) -> None:
        """Correct the linked library in place: its CUDA modules hold cubins, not source.

        Raises CompilerError where the library does not hold them as this TVM release writes them.
        """
        with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
            for cubin in self.cubins:
                at = _format_position(data, cubin)
                if at is None:
                    raise CompilerError(f"{library.name} does not hold its CUDA kernels where TVM 0.27 writes them")
                data[at : at + len(_SOURCE_FORMAT)] = _CUBIN_FORMAT


# A module in a library: kind, byte count, and for CUDA: format, function table, code. Strings carry a 64-bit length.
# "cuda" as the format means source; any other word is handed to the driver as it is.
_SOURCE_FORMAT = b"cuda"
_CUBIN_FORMAT = b"cubn"
_MODULE = re.compile(
    re.escape(struct.pack("<Q", 4) + b"cuda") + b".{8}" + re.escape(struct.pack("<Q", 4)) + b"cuda", re.DOTALL
)


def _format_position(data: mmap.mmap, cubin: bytes) -> int | None:
    """Where the format word stands of the module that holds this code."""
    code = data.find(struct.pack("<Q", len(cubin)) + cubin)
    if code < 0:
        return None
    before = [match.end() for match in _MODULE.finditer(data, 0, code)]
    return before[-1] - len(_SOURCE_FORMAT) if before else None


@contextlib.contextmanager
def embedded_cubins(architectures: Sequence[str], compiler: CudaCompiler | None = None) -> Iterator[EmbeddedCubins]:
    """While open, CUDA modules that TVM builds are compiled for these; after linking, call `finish` on the library.

    Raises CompilerError where no compiler is found (on entry) or where it fails (from the build inside).
    """
    chosen = compiler or find_compiler()
    embedded = EmbeddedCubins()

    def postprocess(source: str, _: Any) -> bytes:
        try:
            compiled = _without_spills(chosen, source, architectures)
        except CompilerError as error:
            embedded.error = error
            raise
        embedded.cubins.append(compiled.code)
        embedded.kernels.extend(compiled.kernels)
        return compiled.code

    with registered(_POSTPROCESS, postprocess), _environment(_FORCE_PACKING, "1"):
        try:
            yield embedded
        except Exception:
            # TVM passes exceptions on as its own kind.
            if embedded.error is not None:
                raise embedded.error from None
            raise


def _without_spills(compiler: CudaCompiler, source: str, architectures: Sequence[str]) -> Compiled:
    """Compiled once more where registers spill: ptxas spills some to have more blocks on a multiprocessor, unless told
    that one is enough.
    """
    compiled = compiler.compile(source, architectures)
    spilling = {kernel.name for kernel in compiled.kernels if kernel.spills}
    if not spilling:
        return compiled

    def with_one_block(bounds: re.Match[str]) -> str:
        return f"__launch_bounds__({bounds[1]}, 1) {bounds[2]}" if bounds[2] in spilling else bounds[0]

    return compiler.compile(_BOUNDS.sub(with_one_block, source), architectures)


_BOUNDS = re.compile(r"__launch_bounds__\((\d+)\) (\w+)")


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
