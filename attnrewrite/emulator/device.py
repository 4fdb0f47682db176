"""A Metal device for TVM on a machine without one.

    with metal_device(recording=True) as device:
        executable = tvm.compile(module, metal_target())      # or an artifact's library, loaded
        machine = relax.VirtualMachine(executable, [tvm.metal(), tvm.cpu()])
        ...
        device.launches, device.findings

While it is open, what TVM builds or loads for Metal is compiled for this CPU, and `tvm.metal()` exists: memory of its
own behind opaque handles, kernels that run where they are launched. Host code is TVM's own, so arguments, launch
extents, temporary buffers and the order of launches are those of a Mac.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi

from attnrewrite.emulator.kernels import HERE, MetalKernel, compile_kernels, compile_source, from_bytes, from_tvm
from attnrewrite.lowering.registered import registered
from attnrewrite.lowering.targets import parse_target

_PARAMETERS = 31
_FINDINGS = 256


class _Traffic(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("requested", "per_group", "distinct")]


class _Parameter(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 64), ("extent", ctypes.c_int64), ("reads", _Traffic), ("writes", _Traffic)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char * 192),
        *(
            (name, ctypes.c_int64)
            for name in ("groups", "threads", "barriers", "shared_bytes", "shared_reads", "shared_writes")
        ),
        ("num_parameters", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("parameters", _Parameter * _PARAMETERS),
    ]


class _Session(ctypes.Structure):
    """`emulator::Session` of include/session.h, as far as Python looks at it."""

    _fields_ = [
        ("exists", ctypes.c_int32),
        ("recording", ctypes.c_int32),
        ("order", ctypes.c_uint32),
        ("num_findings", ctypes.c_int32),
        ("num_launches", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("launches", ctypes.POINTER(_Launch)),
        ("findings", ctypes.c_char * 400 * _FINDINGS),
    ]


@dataclass(frozen=True)
class Traffic:
    """Bytes moved between a kernel and one of its buffers.

    requested: as the threads ask for them, vectors by their size. per_group: what each threadgroup touches, counted
    once however often it comes back. distinct: what the grid touches, counted once: the least there can be.
    """

    requested: int
    per_group: int
    distinct: int


@dataclass(frozen=True)
class BufferTraffic:
    """What one launch moved to and from one buffer of device memory. extent: bytes of the tensor in it."""

    name: str
    extent: int
    reads: Traffic
    writes: Traffic


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    groups: threadgroups of the grid; threads: of a threadgroup. barriers: that a threadgroup passes, on average.
    shared_bytes: threadgroup memory in use; shared_reads, shared_writes: bytes moved to and from it by all threads.
    """

    kernel: str
    groups: int
    threads: int
    barriers: int
    shared_bytes: int
    shared_reads: int
    shared_writes: int
    buffers: tuple[BufferTraffic, ...]

    @property
    def requested(self) -> int:
        """Bytes of device memory read and written."""
        return sum(b.reads.requested + b.writes.requested for b in self.buffers)

    def __str__(self) -> str:
        lines = [
            f"{self.kernel}: {self.groups} x {self.threads} threads, {self.barriers} barriers, "
            f"{self.shared_bytes} bytes of threadgroup memory (read {self.shared_reads}, written {self.shared_writes})"
        ]
        for buffer in self.buffers:
            for word, moved in (("reads", buffer.reads), ("writes", buffer.writes)):
                if moved.requested:
                    lines.append(
                        f"  {word} {buffer.name} [{buffer.extent}]: {moved.requested} requested, "
                        f"{moved.per_group} per group, {moved.distinct} distinct"
                    )
        return "\n".join(lines)


class MetalDevice:
    """The emulated device of this process, as `metal_device` opens it."""

    def __init__(self, session: _Session, library: ctypes.CDLL) -> None:
        self._session = session
        self._library = library

    @property
    def launches(self) -> tuple[Launch, ...]:
        """What was recorded since `clear`, in order."""
        return tuple(_launch(self._session.launches[i]) for i in range(self._session.num_launches))

    @property
    def findings(self) -> tuple[str, ...]:
        """Faults that a GPU would not forgive, one sentence for each kernel, buffer and kind."""
        return tuple(self._session.findings[i].value.decode() for i in range(self._session.num_findings))

    def clear(self) -> None:
        self._session.num_launches = self._session.num_findings = 0

    def declare(self, tensor: Any, *, new: bool = False) -> None:
        """Say which tensor lies in its memory now, where that was taken from a larger piece. new: it holds nothing."""
        size = tensor.numel() * tvm_ffi.dtype(tensor.dtype).itemsize
        self._library.attnrewrite_emulator_declare(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(size), int(new))

    def watch(self, machine: Any) -> None:
        """Declare the tensors of a `relax.VirtualMachine` as it makes and uses them, so that bounds are theirs."""

        def before_and_after(_: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
            if before:
                for argument in arguments:
                    if _on_device(argument):
                        self.declare(argument)
            elif name == "vm.builtin.alloc_tensor" and _on_device(result):
                self.declare(result, new=True)
            return 0  # go on

        machine.set_instrument(before_and_after)


def metal_target() -> tvm.target.Target:
    """TVM's target for `--target metal`, with this machine as the host."""
    return tvm.target.Target({**parse_target("metal").tvm, "host": {"kind": "llvm"}})


@contextlib.contextmanager
def metal_device(*, recording: bool = False, order: int = 0) -> Iterator[MetalDevice]:
    """While open, TVM has a Metal device, which this process's CPU plays.

    recording: count and check every access to memory, some ten times slower; only of kernels built or loaded
    meanwhile. order: in which threads take turns: 0: in alternating directions; 1: backwards; otherwise the seed of a
    random order. Raises CompilerError from whatever builds a module that the emulator does not compile.
    """
    session, library = _device()
    before = (session.exists, session.recording, session.order)
    device = MetalDevice(session, library)
    device.clear()

    def create(sources: Any, _: str, functions: Any, *__: Any) -> Any:
        return _module(from_tvm(sources, functions), recording)

    def load(data: Any) -> Any:
        return _module(from_bytes(bytes(data)), recording)

    with registered("ffi.Module.create.metal", create), registered("ffi.Module.load_from_bytes.metal", load):
        session.exists, session.recording, session.order = 1, int(recording), order
        try:
            yield device
        finally:
            session.exists, session.recording, session.order = before


def _module(kernels: list[MetalKernel], recording: bool) -> Any:
    return tvm.runtime.load_module(str(compile_kernels(kernels, instrumented=recording)))


@functools.cache
def _device() -> tuple[_Session, ctypes.CDLL]:
    """The library with the device, which TVM finds by its name from now on."""
    path = compile_source((HERE / "device.cpp").read_text(encoding="utf-8"))
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # where libraries of kernels find the session
    module = tvm.runtime.load_module(str(path))
    tvm_ffi.register_global_func("device_api.metal", module["device"])
    return _Session.in_dll(library, "attnrewrite_emulator_session"), library


def _on_device(value: Any) -> bool:
    return isinstance(value, tvm_ffi.Tensor) and value.device.type == "metal"


def _launch(raw: _Launch) -> Launch:
    def traffic(counted: _Traffic) -> Traffic:
        return Traffic(counted.requested, counted.per_group, counted.distinct)

    buffers = tuple(
        BufferTraffic(p.name.decode(), p.extent, traffic(p.reads), traffic(p.writes))
        for p in raw.parameters[: raw.num_parameters]
    )
    return Launch(
        raw.kernel.decode(),
        raw.groups,
        raw.threads,
        raw.barriers,
        raw.shared_bytes,
        raw.shared_reads,
        raw.shared_writes,
        buffers,
    )
