"""What a CUDA kernel takes of a multiprocessor, as the compiler says it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_KERNEL = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'")
_START = re.compile(r"(?=Compiling entry function)")
_FRAME = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
_REGISTERS = re.compile(r"Used (?P<count>\d+) registers")
_SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")


@dataclass(frozen=True)
class KernelResources:
    """registers: of a thread, 32 bits each. spill_stores, spill_loads: bytes of instructions that move registers to
    and from local memory. stack_bytes: of a thread's local memory, spilled registers and arrays that are indexed.
    shared_bytes: of a block, those known while compiling.
    """

    name: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    shared_bytes: int

    @property
    def spills(self) -> bool:
        return bool(self.spill_stores or self.spill_loads)


def read_resources(log: str) -> tuple[KernelResources, ...]:
    """The kernels that a compiler's log (`ptxas -v`) tells of, in its order; one told of in part is left out."""
    found = []
    for part in _START.split(log):
        kernel, frame = _KERNEL.match(part), _FRAME.search(part)
        registers, shared = _REGISTERS.search(part), _SHARED.search(part)
        if kernel is None or frame is None or registers is None:
            continue
        found.append(
            KernelResources(
                kernel["name"],
                kernel["arch"],
                int(registers["count"]),
                int(frame["stores"]),
                int(frame["loads"]),
                int(frame["stack"]),
                int(shared["bytes"]) if shared else 0,
            )
        )
    return tuple(found)
