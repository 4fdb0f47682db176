"""What can be compiled for, as one table. Importing this does not import TVM."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from typing import Any, Literal

from attnrewrite.errors import UserError
from attnrewrite.runtime import is_linked_in

# LLVM IR of a Metal library's host functions, by which it can be run where there is no Mac.
HOST_CODE = "host.ll.gz"

Kind = Literal["cpu", "arm", "metal", "cuda"]


@dataclass(frozen=True)
class Target:
    """One compilation target.

    name: as the user writes it, `kind` or `kind:chip`, `cuda:chip+chip` for several GPUs. tvm: the TVM target, as the
    JSON object its constructor takes; the host's own CPU is filled in by the compiler where `tvm` names none. link: the
    zig target triple the library is linked for, None for this machine. library: file name of what comes out.
    description: one line about that.
    """

    name: str
    kind: Kind
    chip: str | None
    tvm: dict[str, Any] = field(hash=False)
    link: str | None
    library: str
    description: str

    @property
    def device(self) -> str:
        """The device type the artifact's tensors live on: cpu, metal or cuda."""
        return "cpu" if self.kind == "arm" else self.kind

    @property
    def architectures(self) -> tuple[str, ...]:
        """What CUDA kernels are compiled for, ascending; their source is written for the first. Empty without CUDA."""
        if self.kind != "cuda":
            return ()
        several = _architectures(self.chip or _DEFAULT_CUDA)
        return several if len(several) > 1 else (str(self.tvm["arch"]),)

    @property
    def is_linked_in(self) -> bool:
        """Whether the library is a static one, for an app."""
        return is_linked_in(self.library)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "tvm": self.tvm, "link": self.link, "library": self.library}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Target:
        """The target `to_json` wrote, whatever overrode its TVM part."""
        return parse_target(document["name"], json.dumps(document["tvm"]))


_LINUX_ARM = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
_MACOS_ARM = {"kind": "llvm", "mtriple": "arm64-apple-macos"}

# chip -> LLVM's name of the core, and the extensions beyond its architecture's base that LLVM needs to be told of.
_ARM_CHIPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cortex-a53": ("cortex-a53", ("+neon",)),
    "cortex-a55": ("cortex-a55", ("+neon", "+fullfp16", "+dotprod")),
    "cortex-a72": ("cortex-a72", ("+neon",)),
    "cortex-a76": ("cortex-a76", ("+neon", "+fullfp16", "+dotprod")),
    "cortex-a78": ("cortex-a78", ("+neon", "+fullfp16", "+dotprod")),
    "neoverse-n1": ("neoverse-n1", ("+neon", "+fullfp16", "+dotprod")),
    "neoverse-n2": ("neoverse-n2", ("+neon", "+fullfp16", "+dotprod")),
    "neoverse-v1": ("neoverse-v1", ("+neon", "+fullfp16", "+dotprod")),
    "neoverse-v2": ("neoverse-v2", ("+neon", "+fullfp16", "+dotprod")),
    "apple-m1": ("apple-m1", ("+neon", "+fullfp16", "+dotprod")),
    "apple-m2": ("apple-m2", ("+neon", "+fullfp16", "+dotprod")),
}

_CUDA_CHIPS = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
_DEFAULT_CUDA = "sm_80"
# What `cuda:all` stands for, and what every kernel is compiled for in tests.
CUDA_PRESETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
_ALL = "all"

_METAL_CHIPS = ("m1", "m2", "m3", "m4")
# Apps for iPhones and iPads whose GPU has what an M1's has.
_IOS = "ios"
_IOS_ARM = {"kind": "llvm", "mtriple": "arm64-apple-ios16.0", "mcpu": "apple-a14"}

_DESCRIPTIONS: dict[Kind, str] = {
    "cpu": "shared library for this machine's CPU",
    "arm": "aarch64 shared library (Linux; macOS for the apple chips), linked from any host",
    "metal": "arm64 dylib for macOS with the Metal kernels inside",
    "cuda": "shared library with the CUDA kernels inside, for the GPU architectures named",
}

_IOS_DESCRIPTION = "arm64 static library for apps on iOS 16, with header and Swift example; weights in a file beside it"


def _cpu(chip: str | None) -> dict[str, Any]:
    return {"kind": "llvm"}


def _arm(chip: str | None) -> dict[str, Any]:
    if chip is None:
        return {**_LINUX_ARM, "mcpu": "generic", "mattr": ["+neon"]}
    core, features = _ARM_CHIPS[chip]
    base = _MACOS_ARM if chip.startswith("apple-") else _LINUX_ARM
    return {**base, "mcpu": core, "mattr": list(features)}


def _metal(chip: str | None) -> dict[str, Any]:
    return {
        "kind": "metal",
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 32768,
        "thread_warp_size": 32,
        "host": {**(_IOS_ARM if chip == _IOS else {**_MACOS_ARM, "mcpu": f"apple-{chip or 'm1'}"}), "mattr": ["+neon"]},
    }


def _cuda(chip: str | None) -> dict[str, Any]:
    return {
        "kind": "cuda",
        "arch": _architectures(chip or _DEFAULT_CUDA)[0],
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 49152,
        "thread_warp_size": 32,
        "host": {"kind": "llvm"},
    }


_KINDS: dict[Kind, tuple[Any, tuple[str, ...]]] = {
    "cpu": (_cpu, ()),
    "arm": (_arm, tuple(_ARM_CHIPS)),
    "metal": (_metal, (*_METAL_CHIPS, _IOS)),
    "cuda": (_cuda, (*_CUDA_CHIPS, _ALL)),
}


def _architectures(chip: str) -> tuple[str, ...]:
    """ "sm_90+sm_80" -> ("sm_80", "sm_90")"""
    if chip == _ALL:
        return CUDA_PRESETS
    return tuple(sorted(set(chip.split("+")), key=lambda name: int(name.removeprefix("sm_"))))


def known_targets() -> list[str]:
    """Every name `parse_target` takes, kinds first."""
    return [*_KINDS, *(f"{kind}:{chip}" for kind, (_, chips) in _KINDS.items() for chip in chips)]


def list_targets() -> list[Target]:
    """Every known target, in the order of `known_targets`."""
    return [parse_target(name) for name in known_targets()]


def parse_target(text: str, tvm_target_json: str | None = None) -> Target:
    """The target named `kind`, `kind:chip` or `cuda:chip+chip`.

    tvm_target_json: a JSON object that overrides fields of its TVM target.
    Raises UserError for an unknown name, which lists the known ones, and for JSON that is not an object.
    """
    kind_text, _, chip_text = text.strip().lower().partition(":")
    chip = chip_text or None
    kind = next((k for k in _KINDS if k == kind_text), None)
    if kind is None:
        raise UserError(f"unknown target {text!r}; known are {', '.join(_KINDS)}, most with a chip, as in cuda:sm_90")
    build, chips = _KINDS[kind]
    if chip is not None and not _is_known(kind, chip, chips):
        known = ", ".join(f"{kind}:{c}" for c in chips) or f"only {kind}"
        several = ", or several of these as in cuda:sm_80+sm_90" if kind == "cuda" else ""
        raise UserError(f"unknown chip in target {text!r}; known are {known}{several}")
    tvm = build(chip)
    if tvm_target_json is not None:
        tvm = {**tvm, **_parse_json(tvm_target_json)}
    link, library = _product(kind, chip)
    return Target(
        name=f"{kind}:{chip}" if chip else kind,
        kind=kind,
        chip=chip,
        tvm=tvm,
        link=link,
        library=library,
        description=_IOS_DESCRIPTION if chip == _IOS else _DESCRIPTIONS[kind],
    )


def _is_known(kind: Kind, chip: str, chips: tuple[str, ...]) -> bool:
    return chip in chips or (kind == "cuda" and set(chip.split("+")) <= set(_CUDA_CHIPS))


def _product(kind: Kind, chip: str | None) -> tuple[str | None, str]:
    """The zig target triple and the name of the library."""
    if chip == _IOS:
        return "aarch64-ios.16.0", "model.a"
    if kind == "metal" or (chip or "").startswith("apple-"):
        return "aarch64-macos", "model.dylib"
    if kind == "arm":
        return "aarch64-linux-gnu", "model.so"
    return None, "model.dylib" if kind == "cpu" and platform.system() == "Darwin" else "model.so"


def _parse_json(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--tvm-target is not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(document, dict):
        raise UserError(f'--tvm-target must be a JSON object such as {{"mcpu": "znver4"}}, got {text!r}')
    return document
