"""Machine code of NVIDIA GPUs as `nvdisasm -c` prints it: instructions, the loops they make, and how many of each kind.

A loop is closed by a jump back to a block that every way to the jump passes through; an instruction counts for the
innermost loop around it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# What the mnemonics of a kind are; the first that fits counts.
KINDS = {
    "FFMA": r"FFMA",
    "FADD, FMUL": r"FADD|FMUL",
    "other float": r"FMNMX|FSEL|FSETP?|FCHK",
    "HMMA": r"HMMA",
    "half": r"H(ADD2|MUL2|FMA2|MNMX2|SETP?2)",
    "MUFU": r"MUFU",
    "convert": r"F2\w+|I2\w+",
    "SHFL": r"SHFL",
    "BAR": r"BAR",
    "LDSM": r"LDSM",
    "LDS": r"LDS",
    "STS": r"STS",
    "LDGSTS": r"LDGSTS",
    "LDG": r"LDG",
    "STG": r"STG",
    "LDL": r"LDL",
    "STL": r"STL",
    "other": r".*",
}
"""`other`: addresses, predicates, constants, moves and jumps."""

_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
_MEMORY = ("LDS", "STS", "LDGSTS", "LDG", "STG", "LDL", "STL")
_KERNEL = re.compile(r"\.text\.(\w+):")
_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]+)\*/\s+\{?\s*(?P<guard>@!?\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"`\((\.L\w+)\)")
_WIDTH = re.compile(r"\.[US]?(8|16|64|128)\b")
_JUMPS = ("BRA", "BRX", "JMP", "JMX")
_ENDS = ("EXIT", "RET")


@dataclass(frozen=True)
class Instruction:
    """conditional: not executed always. target: the address that a jump goes to, where it is known."""

    address: int
    opcode: str
    conditional: bool = False
    target: int | None = None

    @property
    def mnemonic(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def leaves(self) -> bool:
        """Whether what follows in memory need not be executed next."""
        return self.mnemonic in (*_JUMPS, *_ENDS)

    @property
    def kind(self) -> str:
        """Of `KINDS`; accesses to memory with the bits that a thread moves, as in "LDS 128"."""
        kind = next(kind for kind, pattern in _PATTERNS.items() if pattern.fullmatch(self.mnemonic))
        if kind not in _MEMORY:
            return kind
        width = _WIDTH.search(self.opcode)
        return f"{kind} {width[1] if width else 32}"


@dataclass(eq=False)
class Loop:
    """first, last: addresses of its body, which other code may interrupt. own: what is in no loop within it."""

    first: int
    last: int
    parent: Loop | None = None
    own: Counter[str] = field(default_factory=Counter)

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1


@dataclass(frozen=True)
class Kernel:
    """loops: by address, outer before inner ones; the first is the kernel itself, outside of all loops."""

    name: str
    loops: tuple[Loop, ...]

    def issued(self, trips: Sequence[int]) -> Counter[str]:
        """What one warp issues, by kind. trips: how often each loop but the first goes round, for each time that it is
        entered. Code under a condition counts as executed. Raises ValueError for too few or too many.
        """
        times = {self.loops[0]: 1}
        for loop, count in zip(self.loops[1:], trips, strict=True):
            assert loop.parent is not None
            times[loop] = count * times[loop.parent]
        found: Counter[str] = Counter()
        for loop in self.loops:
            found.update({kind: times[loop] * count for kind, count in loop.own.items()})
        return found


def read_kernels(listing: str) -> list[Kernel]:
    """The kernels of a listing; what is no code (headers, encodings, data) is passed over."""
    lines: dict[str, list[re.Match[str]]] = {}
    labels: dict[str, int] = {}
    own: list[re.Match[str]] = []
    waiting: list[str] = []
    for line in map(str.strip, listing.splitlines()):
        if kernel := _KERNEL.fullmatch(line):
            own = lines.setdefault(kernel[1], [])
        elif label := _LABEL.fullmatch(line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(line):
            labels |= dict.fromkeys(waiting, int(found["address"], 16))
            waiting = []
            own.append(found)
    return [
        Kernel(name, find_loops([_instruction(found, labels) for found in own])) for name, own in lines.items() if own
    ]


def _instruction(found: re.Match[str], labels: Mapping[str, int]) -> Instruction:
    jumps = found["opcode"].split(".")[0] in _JUMPS
    target = _TARGET.search(found["operands"]) if jumps else None
    # A jump's condition is its guard, or an operand before the target.
    conditional = found["guard"] is not None or (jumps and "," in found["operands"])
    return Instruction(
        int(found["address"], 16), found["opcode"], conditional, None if target is None else labels[target[1]]
    )


def find_loops(body: Sequence[Instruction]) -> tuple[Loop, ...]:
    """The natural loops of a kernel, as in `Kernel.loops`; code that only calls reach is in none."""
    blocks, after = _blocks(body)
    dominators = _dominators(after)
    members: dict[int, set[int]] = {}
    for block in dominators:
        for header in after[block] & dominators[block]:
            members.setdefault(header, {header}).update(_reaching(block, header, after))
    whole = Loop(body[0].address, body[-1].address)
    loops: dict[int, Loop] = {}

    def innermost(inside: Iterable[int]) -> Loop:
        return loops[min(inside, key=lambda h: len(members[h]))]

    for header in sorted(members, key=lambda h: len(members[h]), reverse=True):
        around = [other for other in loops if header in members[other]]
        addresses = [i.address for block in members[header] for i in blocks[block]]
        loops[header] = Loop(min(addresses), max(addresses), innermost(around) if around else whole)
    for number, block in enumerate(blocks):
        inside = [header for header in loops if number in members[header]]
        (innermost(inside) if inside else whole).own.update(i.kind for i in block)
    return (whole, *sorted(loops.values(), key=lambda loop: (loop.first, loop.depth)))


def _blocks(body: Sequence[Instruction]) -> tuple[list[list[Instruction]], list[set[int]]]:
    """Runs of instructions without jumps, and the numbers of those that may come after each."""
    starts = {i.target for i in body}
    blocks: list[list[Instruction]] = []
    for instruction in body:
        if not blocks or blocks[-1][-1].leaves or instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    numbers = {block[0].address: number for number, block in enumerate(blocks)}
    after = []
    for number, block in enumerate(blocks):
        last = block[-1]
        found = set() if last.target is None else {numbers[last.target]}
        if (last.conditional or not last.leaves) and number + 1 < len(blocks):
            found.add(number + 1)
        after.append(found)
    return blocks, after


def _dominators(after: Sequence[set[int]]) -> dict[int, set[int]]:
    """The blocks that every way from the first block to one passes through, of each that can be reached."""
    reached, waiting = {0}, [0]
    while waiting:
        new = after[waiting.pop()] - reached
        reached |= new
        waiting += new
    before = {block: {b for b in reached if block in after[b]} for block in reached}
    found = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = {block} | set.intersection(*(found[b] for b in before[block]))
            changed |= new != found[block]
            found[block] = new
    return found


def _reaching(block: int, header: int, after: Sequence[set[int]]) -> set[int]:
    """The blocks from which `block` is reached without passing through `header`, with both."""
    found, waiting = {block, header}, [block]
    while waiting:
        at = waiting.pop()
        new = set() if at == header else {b for b, own in enumerate(after) if at in own} - found
        found |= new
        waiting += new
    return found


def shared_bytes(counts: Mapping[str, int]) -> int:
    """What a warp's accesses ask shared memory for, all lanes' bytes; those that several lanes read count for each."""
    matrices = 512 * counts.get("LDSM", 0)  # of four 8 x 8 halves
    accesses = [(kind.split(), n) for kind, n in counts.items() if kind.startswith(("LDS ", "STS ", "LDGSTS "))]
    return matrices + sum(32 * int(bits) // 8 * n for (_, bits), n in accesses)


def kinds_in_order(counts: Iterable[Mapping[str, int]]) -> list[str]:
    """Those that occur, as `KINDS` lists them, wide accesses first."""
    order = list(KINDS)

    def place(kind: str) -> tuple[int, int]:
        name, _, bits = kind.rpartition(" ")
        return (order.index(name), -int(bits)) if bits.isdigit() else (order.index(kind), 0)

    return sorted({kind for own in counts for kind in own}, key=place)
