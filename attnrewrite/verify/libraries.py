"""How a compiled library is run for verification: on this machine, in an emulator, or not at all."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from pathlib import Path

from attnrewrite.lowering.targets import parse_target
from attnrewrite.runtime import linked_in_sentence
from attnrewrite.verify.runners import CompiledRunner, EmulatedRunner, MetalRunner, Runner


def kind_of(target: str) -> str:
    """cpu, arm, metal or cuda, of a target with or without its chip."""
    return target.partition(":")[0]


def runs_here(target: str) -> bool:
    """Whether this machine can run the library: a CPU's on the machine it was made for, a GPU's where there is one."""
    kind = kind_of(target)
    if parse_target(target).is_linked_in:
        return False
    if kind in ("cuda", "metal"):
        import tvm

        return bool(tvm.device(kind, 0).exist)
    return kind == "cpu" or (kind == "arm" and platform.machine() == "aarch64" and platform.system() == "Linux")


def is_emulated_metal(target: str) -> bool:
    """Whether `--emulate` can run the library."""
    return kind_of(target) == "metal" and not parse_target(target).is_linked_in


def why_not_here(target: str) -> str:
    """Of a library that this machine cannot run."""
    known = parse_target(target)
    if known.is_linked_in:
        return linked_in_sentence(known.library, target)
    sentence = f"the library for {target} was not run: this machine has no such device"
    return f"{sentence}; `attnrewrite verify --emulate` runs it on the CPU" if is_emulated_metal(target) else sentence


def library_runner(
    target: str, directory: Path, threads: int | None, emulate: Collection[str]
) -> Callable[[], Runner] | str:
    """What loads the library of an artifact directory, or a sentence on why it is not run.

    emulate: kinds of target whose emulator may take its time, and is fetched where it is missing. That of arm is used
    without, too, where it is at hand; that of metal is not.
    """
    if runs_here(target):
        return lambda: CompiledRunner(directory, threads)
    kind = kind_of(target)
    if kind == "metal" and kind in emulate:
        return lambda: MetalRunner(directory)
    if kind != "arm" or "apple" in target:
        return why_not_here(target)
    from attnrewrite.lowering.qemu import Missing, find_emulator

    emulator = find_emulator(prepare=kind in emulate)
    if isinstance(emulator, Missing):
        hint = "" if kind in emulate else "; `attnrewrite verify` prepares one where it can"
        return f"the library for {target} was not run, for want of an emulator: {emulator.reason}{hint}"
    return lambda: EmulatedRunner(emulator, directory)
