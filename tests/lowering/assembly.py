"""Reading generated assembly: the loops in it, and what a multiply-add loop does besides multiplying.

Understands what LLVM prints for x86-64 (AT&T) and for aarch64: labels, branches, operands in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from attnrewrite.lowering import build, importer
from attnrewrite.lowering.targets import parse_target

_LABEL = re.compile(r"^\.?(L\w+):")
_BRANCH = re.compile(r"^\t(?:j\w+|b(?:\.\w+)?|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+\.?(L\w+)\s*$")
_MULTIPLY_ADD = re.compile(r"^\t(?:vf[n]?m(?:add|sub)\d+[ps][sdh]|fml[as]|fn?m(?:add|sub)|vdpbf16ps)\b")
_LOAD_ARM = re.compile(r"^\tld(?:p|ur|r|\d)\w*\s")
_MEMORY_X86 = re.compile(r"-?\w*\(%\w+[^)]*\)")
_WRITES_MEMORY_X86 = re.compile(r"\)\s*(?:\{%k\d\})?$")
_LANE_BY_LANE = re.compile(
    r"^\t(?:v?p?gather|vp?scatter|vpinsr|vinsertps|ins\s|mov\s+v\d+\.\w\[|ld1\s+\{\s*v\d+\.\w\s*\}\[)"
)
_FRAMES = {"rbp": re.compile(r"^\tmovq\s+%rsp, %rbp"), "x29": re.compile(r"^\t(?:mov|add)\s+x29, sp")}


@dataclass(frozen=True)
class Loop:
    """The instructions of an innermost loop.

    frame: the register that addresses the function's stack besides the stack pointer, if one does.
    """

    lines: tuple[str, ...]
    frame: str | None

    @property
    def multiply_adds(self) -> int:
        return sum(bool(_MULTIPLY_ADD.match(line)) for line in self.lines)

    @property
    def loads(self) -> int:
        """Registers read from memory, operands of arithmetic among them; a pair counts twice."""
        count = 0
        for line in self.lines:
            if _LOAD_ARM.match(line):
                count += 2 if line.startswith("\tldp") else 1
            elif _MEMORY_X86.search(line) and not line.startswith(("\tlea", "\tprefetch", "\tnop")):
                count += not _WRITES_MEMORY_X86.search(line)
        return count

    @property
    def spills(self) -> list[str]:
        """Accesses of fixed places on the stack. What is indexed is an array that lies there, such as a panel."""
        registers = ["rsp", "sp", *([self.frame] if self.frame else [])]
        place = re.compile(rf"\(%({'|'.join(registers)})\)|\[({'|'.join(registers)})(, #-?\d+)?\]")
        return [line for line in self.lines if place.search(line)]

    @property
    def lane_by_lane(self) -> list[str]:
        """Gathers, scatters and single lanes inserted."""
        return [line for line in self.lines if _LANE_BY_LANE.match(line)]


def assembly(proto: onnx.ModelProto, target: str, tvm_target: str | None = None, precision: str = "fp32") -> str:
    """What the whole CPU pipeline makes of a model."""
    chosen = parse_target(target, tvm_target)
    description = build.tvm_target(chosen)
    executable = build.build(
        importer.import_onnx(proto, chosen, description), description, precision=precision
    ).executable
    return "\n".join(_sources(executable.mod))


def _sources(module: Any) -> Iterator[str]:
    if module.kind == "llvm":
        yield module.inspect_source("asm")
    for imported in module.imports:
        yield from _sources(imported)


def innermost_loops(text: str) -> list[Loop]:
    """Loops that hold no other loop, in order."""
    lines = text.splitlines()
    labels = {match.group(1): i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    ends: dict[int, int] = {}  # start of a loop -> the last branch back to it
    for i, line in enumerate(lines):
        if (match := _BRANCH.match(line)) and (start := labels.get(match.group(1), i)) < i:
            ends[start] = i
    innermost = [(s, e) for s, e in ends.items() if not any(s < other and ends[other] <= e for other in ends)]
    return [
        Loop(tuple(line for line in lines[s : e + 1] if line.startswith("\t")), _frame(lines, s)) for s, e in innermost
    ]


def _frame(lines: Sequence[str], at: int) -> str | None:
    function = next(i for i in range(at, -1, -1) if lines[i].startswith("\t.cfi_startproc"))
    return next(
        (name for name, made in _FRAMES.items() if any(made.match(line) for line in lines[function:at])),
        None,
    )


def multiply_add_loops(text: str, least: int = 8) -> list[Loop]:
    """Innermost loops with at least so many multiply-adds."""
    return [loop for loop in innermost_loops(text) if loop.multiply_adds >= least]
