"""CUDA kernels become machine code here: nvcc or NVRTC is found, run, and its cubin put into the library.

TVM writes CUDA source. Where it has no CUDA runtime at hand it would leave that source in the library, to be compiled
on the device by whatever is installed there. So the source is compiled while the library is built: `embedded_cubins`
answers TVM's last call before it packs the source with the cubin in its place, and `finish` corrects the one word in
the linked library that still calls it source. What comes out is what TVM writes on a machine with a GPU.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from attnrewrite.errors import CompilerError, first_error
from attnrewrite.lowering.registered import registered

_POSTPROCESS = "tvm_callback_cuda_postproc"
_FORCE_PACKING = "TVM_COMPILE_FORCE_FALLBACK"  # TVM packs what it is given instead of loading it into a driver
_TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
_DEFAULT_TOOLKIT = Path("/usr/local/cuda")
_INSTALL_HINT = (
    "install the CUDA toolkit (nvcc on PATH, or CUDA_HOME set), "
    "or run: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"
)


class CudaCompiler(Protocol):
    """Compiles CUDA source text to a cubin for `arch` (as in sm_90). Raises CompilerError with the compiler's words."""

    def compile(self, source: str, arch: str) -> bytes: ...


def find_compiler() -> CudaCompiler:
    """nvcc from PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda; otherwise NVRTC from there or from its pip package.

    Raises CompilerError that says what to install where there is neither.
    """
    toolkits = [Path(os.environ[v]) for v in _TOOLKIT_VARIABLES if os.environ.get(v)] + [_DEFAULT_TOOLKIT]
    on_path = shutil.which("nvcc")
    for nvcc in [Path(on_path)] if on_path else [t / "bin" / "nvcc" for t in toolkits]:
        if os.access(nvcc, os.X_OK):
            return Nvcc(nvcc)
    packages = [p for entry in sys.path for p in (Path(entry) / "nvidia").glob("*") if p.is_dir()]
    for folder in [*packages, *toolkits]:
        for library in sorted([*folder.glob("lib/libnvrtc.so.*"), *folder.glob("lib64/libnvrtc.so.*")]):
            if "alt" not in library.name:
                return Nvrtc(library, tuple(p / "include" for p in (*packages, *toolkits) if (p / "include").is_dir()))
    raise CompilerError(f"no CUDA compiler found; {_INSTALL_HINT}")


@dataclass(frozen=True)
class Nvcc:
    """The compiler driver of the CUDA toolkit; it needs a host C++ compiler, too."""

    path: Path

    def compile(self, source: str, arch: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            text, cubin = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
            text.write_text(source)
            command = [str(self.path), "-cubin", f"-arch={arch}", "-O3", "-w", str(text), "-o", str(cubin)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise CompilerError(f"nvcc failed for {arch}: {first_error(run.stderr)}")
            return cubin.read_bytes()


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

    def compile(self, source: str, arch: str) -> bytes:
        try:
            # NVRTC opens its builtins by name alone, which finds them only where they are loaded already.
            for builtins in sorted(self.library.parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins))
            nvrtc = ctypes.CDLL(str(self.library))
        except OSError as error:
            raise CompilerError(f"{self.library} cannot be loaded ({error}); {_INSTALL_HINT}") from None
        text = self._PRELUDE + self._STANDARD_HEADERS.sub("", source, count=1)
        options = [f"--gpu-architecture={arch}", "-default-device", "-w", *(f"-I{p}" for p in self.include)]
        program = ctypes.c_void_p()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
        try:
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
                log = _fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
                raise CompilerError(f"NVRTC failed for {arch}: {first_error(log)}")
            return _fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(size_of: Any, copy: Any, program: ctypes.c_void_p) -> bytes:
    """What NVRTC hands out in two calls: the size, then the bytes."""
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    copy(program, buffer)
    return buffer.raw


@dataclass
class EmbeddedCubins:
    """The cubins of one build, in the order TVM asked for them."""

    arch: str
    cubins: list[bytes] = field(default_factory=list)
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
def embedded_cubins(arch: str, compiler: CudaCompiler | None = None) -> Iterator[EmbeddedCubins]:
    """While open, every CUDA module TVM builds is compiled for `arch`; after linking, call `finish` on the library.

    Raises CompilerError where no compiler is found (on entry) or where it fails (from the build inside).
    """
    chosen = compiler or find_compiler()
    embedded = EmbeddedCubins(arch)

    def postprocess(source: str, _: Any) -> bytes:
        try:
            cubin = chosen.compile(source, arch)
        except CompilerError as error:
            embedded.error = error
            raise
        embedded.cubins.append(cubin)
        return cubin

    with registered(_POSTPROCESS, postprocess), _environment(_FORCE_PACKING, "1"):
        try:
            yield embedded
        except Exception:
            # TVM passes exceptions on as its own kind.
            if embedded.error is not None:
                raise embedded.error from None
            raise


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
