"""Metal kernels as a library for this machine's CPU.

Metal Shading Language is C++14 with a few words more. `include/metal_stdlib` supplies those words, `include/fibers.h`
the grid, `include/memory.h` the pointers; ziglang's clang compiles it. What comes out is called by TVM's host code as a
GPU's kernels would be: pointers, scalars, and the extents of the launch.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnrewrite.errors import CompilerError
from attnrewrite.lowering.cache import cache_directory
from attnrewrite.lowering.zig import run_zig

HERE = Path(__file__).parent
INCLUDE = HERE / "include"

_FLAGS = ("-std=c++20", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern", "-w", "-shared", "-fPIC")
_BYTES = {
    "float": 4, "half": 2, "int": 4, "uint": 4, "short": 2, "ushort": 2, "long": 8, "ulong": 8,
    "bool": 1, "uchar": 1, "char": 1,
}  # fmt: skip
_PARAMETER = re.compile(r"\bdevice (?:const )?(\w+)\* ?(\w+) \[\[ ?buffer\(\d+\) ?\]\]")
_ARRAY = re.compile(r"^(\s*)threadgroup (\w+) (\w+)\[(\d+)\];", re.MULTILINE)
_POINTER = re.compile(r"\b(device|threadgroup) (?:const )?(\w+) ?\*")
# Of a thread or its threadgroup, read by component.
_POSITION = re.compile(r"\buint[23]( \w+ \[\[ ?thread\w*_position_in_\w+ ?\]\])")
_POINTER_CLASS = {"device": "emulator::DevicePointer", "threadgroup": "emulator::GroupPointer"}


@dataclass(frozen=True)
class MetalKernel:
    """A kernel as TVM's Metal runtime gets it.

    source: its Metal source, complete in itself. arguments: dtypes, `handle` for buffers, which come first.
    launch_tags: which extents of the grid follow the arguments, in order, as in `blockIdx.x`.
    """

    name: str
    source: str
    arguments: tuple[str, ...]
    launch_tags: tuple[str, ...]


def from_tvm(sources: Mapping[str, Any], functions: Mapping[str, Any]) -> list[MetalKernel]:
    """The kernels of a Metal module, from what TVM creates such a module of."""
    return [
        MetalKernel(
            str(name),
            bytes(sources[name]).decode(),
            tuple(str(dtype) for dtype in function.arg_types),
            tuple(str(tag) for tag in function.launch_param_tags),
        )
        for name, function in functions.items()
    ]


def from_bytes(data: bytes) -> list[MetalKernel]:
    """The kernels of a Metal module as it lies in a library: format, functions, sources, each with its length.

    Raises CompilerError where the module holds compiled Metal, or is not laid out as TVM 0.27 does it.
    """
    reader = Reader(data)
    try:
        if (kind := reader.text()) != "metal":
            raise CompilerError(f"the library holds {kind} kernels, not Metal source")
        functions = {}
        for _ in range(reader.count()):
            name = reader.text()
            reader.text()  # the name once more
            arguments = tuple(reader.dtype() for _ in range(reader.count()))
            tags = tuple(reader.text() for _ in range(reader.count()))
            reader.skip(4 * reader.count())  # one word of TVM's own for each argument
            functions[name] = (arguments, tags)
        sources = {reader.text(): reader.text() for _ in range(reader.count())}
        return [MetalKernel(name, sources[name], *functions[name]) for name in functions]
    except (struct.error, UnicodeDecodeError, LookupError):
        raise CompilerError("the library's Metal kernels are not laid out as TVM 0.27 writes them") from None


class Reader:
    """Reads what TVM serialises: numbers of 64 bits, and before every string and list its length.

    Raises struct.error past the end, and IndexError for a dtype of a kind that no kernel takes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def skip(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) < size:
            raise struct.error
        self._at += size
        return piece

    def count(self) -> int:
        return int(struct.unpack("<Q", self.skip(8))[0])

    def text(self) -> str:
        return self.skip(self.count()).decode()

    def dtype(self) -> str:
        code, bits, _ = struct.unpack("<BBH", self.skip(4))
        return "handle" if code == 3 else f"{('int', 'uint', 'float')[code]}{bits}"


def compile_kernels(kernels: Sequence[MetalKernel], *, instrumented: bool) -> Path:
    """The shared library of these kernels, from the cache where it was compiled before.

    Raises CompilerError where a kernel does not compile.
    """
    parts = ["#include <metal_stdlib>\n"]
    for number, kernel in enumerate(kernels):
        parts.append(f"namespace kernel_{number} {{\n{_translate(kernel)}\n}}\n")
    return compile_source("".join(parts), ["-O1", *(["-DEMULATOR_INSTRUMENTED"] if instrumented else [])])


def compile_source(text: str, flags: Sequence[str] = ()) -> Path:
    """A shared library of C++ source that may include ours and TVM's headers.

    Raises CompilerError where it does not compile, or cannot be kept in the cache.
    """
    import tvm_ffi.libinfo

    headers = sorted(path for path in INCLUDE.iterdir() if path.is_file())
    key = hashlib.sha256(repr((text, *flags, *_FLAGS)).encode())
    for header in headers:
        key.update(header.read_bytes())
    library = cache_directory() / "metal-emulator" / f"{key.hexdigest()[:32]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".compile-") as name:
            source, output = Path(name, "kernels.cpp"), Path(name, "kernels.so")
            source.write_text(text, encoding="utf-8")
            include = [f"-I{INCLUDE}", f"-I{tvm_ffi.libinfo.find_dlpack_include_path()}"]
            command = ["cc", *_FLAGS, *flags, *include, str(source), "-o", str(output)]
            run_zig(command, "the emulator cannot compile the Metal source")
            os.replace(output, library)
    except OSError as error:
        raise CompilerError(
            f"the emulator cannot keep compiled kernels: {error}; ATTNREWRITE_CACHE names another directory for them"
        ) from error
    return library


def _translate(kernel: MetalKernel) -> str:
    """The kernel as C++, and the function by which TVM's host code calls it."""
    buffers = [(element, name.removesuffix("_ptr")) for element, name in _PARAMETER.findall(kernel.source)]
    cells = [_smallest(space, kernel.source) for space in ("device", "threadgroup")]
    source, shared_bytes = _place_arrays(kernel.source)
    source = _POSITION.sub(r"emulator::Index3\1", source)
    source = _POINTER.sub(lambda match: f"{_POINTER_CLASS[match[1]]}<{match[2]}>", source)
    return source + _entry(kernel, buffers, shared_bytes, cells)


def _smallest(space: str, source: str) -> int:
    """Bytes of the smallest element that a kernel accesses in an address space."""
    found = re.findall(rf"\b{space} (?:const )?(\w+)", source)
    return min((_BYTES.get(_scalar(element), 4) for element in found), default=4)


def _place_arrays(source: str) -> tuple[str, int]:
    """Threadgroup arrays as slices of the memory that the emulator gives a threadgroup; and its bytes in use."""
    offset = index = 0

    def place(match: re.Match[str]) -> str:
        nonlocal offset, index
        indent, element, name, count = match.groups()
        arguments = f'{index}, {offset}, {count}, "{name}"'
        offset += -(-int(count) * _size_of(element) // 16) * 16
        index += 1
        return (
            f"{indent}emulator::GroupPointer<{element}> {name} = emulator::threadgroup_array<{element}>({arguments});"
        )

    return _ARRAY.sub(place, source), offset


def _scalar(element: str) -> str:
    return element.removeprefix("packed_").rstrip("234")


def _size_of(element: str) -> int:
    scalar = _scalar(element)
    lanes = {"": 1, "2": 2, "3": 4, "4": 4}[element[len(scalar) :]]
    return _BYTES[scalar] * lanes


def _entry(kernel: MetalKernel, buffers: Sequence[tuple[str, str]], shared_bytes: int, cells: Sequence[int]) -> str:
    """Unpacks arguments and launch extents and runs the grid. cells: bytes, of device and of threadgroup memory."""
    name, count = kernel.name, len(kernel.arguments)
    scalars = [f"args[{i}].integer" for i in range(len(buffers), count)]
    extents = {tag: f"args[{count + i}].integer" for i, tag in enumerate(kernel.launch_tags)}

    def index3(kind: str) -> str:
        return "{" + ", ".join(f"(uint32_t){extents.get(f'{kind}.{axis}', '1')}" for axis in "xyz") + "}"

    operands = [f"emulator::argument(args, {i})" for i in range(len(buffers))]
    operands += [f"*({name}_args_t*)scalars"] if scalars else []
    call = ", ".join([*operands, "Position{block}", "Position{thread_index}"])
    names = ", ".join(f'"{buffer}"' for _, buffer in buffers)
    elements = ", ".join(str(_BYTES[_scalar(element)]) for element, _ in buffers)
    return f"""
static void run(void* arguments, emulator::Index3 block, emulator::Index3 thread_index) {{
  const emulator::Any* args = (const emulator::Any*)arguments;
  int64_t scalars[] = {{{", ".join(scalars) or "0"}}};
  {name}({call});
}}
extern "C" int __tvm_ffi_{name}(void*, const emulator::Any* args, int32_t, emulator::Any* result) {{
  static const char* const names[] = {{{names}}};
  static const int32_t elements[] = {{{elements}}};
  static const emulator::Kernel described = {{
      "{name}", run, {len(buffers)}, names, elements, {shared_bytes}, {cells[0]}, {cells[1]}}};
  return emulator::launch(described, args, {index3("blockIdx")}, {index3("threadIdx")}, result);
}}
"""
