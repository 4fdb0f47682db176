"""A compiled Metal library on a machine that is no Mac: everything in it but the ARM machine code of its host part.

The library is a Mach-O file that holds one block of modules: the model's byte code with the order of its launches and
its weights, and the Metal source of the kernels. Host functions, which check arguments and compute the extents of
launches, lie in it as machine code; beside it lies what that was made from, as LLVM IR, and is made code for this CPU.
"""

from __future__ import annotations

import gzip
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from attnrewrite.emulator.kernels import Reader
from attnrewrite.errors import UserError
from attnrewrite.lowering.targets import HOST_CODE

_MAGIC = 0xFEEDFACF
_SEGMENT, _SYMBOLS = 0x19, 0x2
_BLOCK_SYMBOL = b"___tvm_ffi__library_bin"
# What ties LLVM IR to a processor: the layout of its data, its name, TVM's name for it, the features of functions.
_TIES = tuple(
    re.compile(text, re.MULTILINE)
    for text in (r"^target datalayout = .*$", r"^target triple = .*$", r'!"tvm_target", !"[^"]*"')
)
_FEATURES = re.compile(r'("target-(?:cpu|features)"=)"[^"]*"')


def load_library(library: Path) -> Any:
    """The library's module, for this machine. To be called, and used, while a `metal_device` is open.

    Raises UserError where the file, or the one with its host code, is not what `--target metal` writes.
    """
    host = library.with_name(HOST_CODE)
    try:
        data, code = library.read_bytes(), gzip.decompress(host.read_bytes()).decode()
    except FileNotFoundError as error:
        raise UserError(f"{library} cannot be emulated without {host.name} beside it: {error}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{library} or {host.name} beside it is damaged: {error}") from None
    try:
        reader = Reader(_block(data))
        first_child = [reader.count() for _ in range(reader.count())]
        children = [reader.count() for _ in range(reader.count())]
        modules = [_module(reader, code) for _ in first_child[1:]]
        for module, start, end in zip(modules, first_child, first_child[1:], strict=False):
            for child in children[start:end]:
                module.import_module(modules[child])
        return modules[0]
    except (struct.error, UnicodeDecodeError, IndexError):
        raise UserError(f"{library} is no library of attnrewrite's for Metal, or is damaged") from None


def _module(reader: Reader, host_code: str) -> Any:
    kind = reader.text()
    if kind == "_lib":  # the place of the machine code
        return _host_module(host_code)
    return tvm_ffi.get_global_func(f"ffi.Module.load_from_bytes.{kind}")(reader.skip(reader.count()))


def _host_module(code: str) -> Any:
    """LLVM IR compiled for this CPU, in memory."""
    nothing = tirx.PrimFunc([], tirx.Evaluate(0)).with_attr("global_symbol", "nothing")
    native = tvm.tirx.build(tvm.IRModule({"nothing": nothing}), target="llvm").inspect_source("ll")
    for tie in _TIES:
        own = tie.search(native)
        assert own is not None, "TVM names the processor in all LLVM IR"
        code = tie.sub(lambda _, own=own: str(own[0]), code)  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "host.ll")
        path.write_text(_FEATURES.sub(r'\1""', code), encoding="utf-8")
        return tvm.runtime.load_module(str(path))


def _block(data: bytes) -> bytes:
    """The block of modules of a Mach-O file. Raises struct.error where it has none."""
    segments: list[tuple[int, int, int]] = []
    address = None
    for kind, command in _commands(data):
        if kind == _SEGMENT:
            start, size, offset = struct.unpack_from("<QQQ", command, 24)
            segments.append((start, size, offset))
        elif kind == _SYMBOLS:
            address = _address_of(_BLOCK_SYMBOL, data, *struct.unpack_from("<III", command, 8))
    for start, size, offset in segments:
        if address is not None and start <= address < start + size:
            at = offset + address - start
            (length,) = struct.unpack_from("<Q", data, at)
            return data[at + 8 : at + 8 + length]
    raise struct.error


def _commands(data: bytes) -> Iterator[tuple[int, bytes]]:
    magic, _, _, _, count = struct.unpack_from("<IIIII", data)
    if magic != _MAGIC:
        raise struct.error
    at = 32
    for _ in range(count):
        kind, size = struct.unpack_from("<II", data, at)
        yield kind, data[at : at + size]
        at += size


def _address_of(symbol: bytes, data: bytes, offset: int, count: int, names: int) -> int | None:
    for i in range(count):
        name, _, _, _, value = struct.unpack_from("<IBBHQ", data, offset + 16 * i)
        if data.startswith(symbol + b"\0", names + name):
            return int(value)
    return None
