"""Which ops the kernels of this package compute; the others are compiled from their written-out bodies.

Those of GPUs compute both ops with all operands; docs/metal.md has the list, and the one exception.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec
from attnrewrite.lowering.kernels.window_cpu_operands import is_decomposed

_WINDOW_OPERANDS = frozenset({"query", "key", "value", "bias", "mask", "key_padding", "value_padding"})

_SLIDE_OPERANDS = frozenset({"query", "key", "value", "bias", "key_kernel", "key_bias", "value_kernel", "value_bias"})


Shape = tuple[int, ...]


def covers(spec: Spec, present: Mapping[str, Shape | None], device: str = "any") -> bool:
    """Whether the kernels of a device ("any": of all of them) compute this op. present: the operands given, with the
    shapes of those that are constants.
    """
    match spec:
        case FlashWindowAttention():
            return _covers_windows(spec, present, device)
        case SlideAttention():
            if device in ("metal", "cuda"):
                # Inward, the neighbours of a block depend on the block: rows that meet at a pixel do not add up.
                return not (spec.overlap_add and "inward" in spec.geometry.borders)
            plain = spec.geometry.is_plain and spec.border == "zero"
            return plain and len(present.get("bias") or (1, 1)) == 2 and _SLIDE_OPERANDS.issuperset(present)


def _covers_windows(spec: FlashWindowAttention, present: Mapping[str, Shape | None], device: str) -> bool:
    if device in ("metal", "cuda"):
        return True
    if spec.shared_query or spec.head_shifts:
        return False
    operands = set(present)
    table = present.get("relative_position")
    # One table per axis, known while compiling, can be laid out for the CPU's kernel.
    if device == "cpu" and table is not None and is_decomposed(spec, table[1]):
        operands.remove("relative_position")
    return _WINDOW_OPERANDS.issuperset(operands)
