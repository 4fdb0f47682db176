"""Which ops the kernels of this package compute; the others are compiled from their written-out bodies."""

from __future__ import annotations

from collections.abc import Mapping

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec

_WINDOW_OPERANDS = frozenset({"query", "key", "value", "bias", "mask", "key_padding", "value_padding"})

_SLIDE_OPERANDS = frozenset({"query", "key", "value", "bias", "key_kernel", "key_bias", "value_kernel", "value_bias"})


def covers(spec: Spec, present: Mapping[str, int | None], device: str = "any") -> bool:
    """Whether the kernels of a device ("any": of all of them) compute this op. present: the operands given, with the
    number of axes of those that are constants.
    """
    match spec:
        case FlashWindowAttention():
            return _covers_windows(spec, present, device)
        case SlideAttention():
            plain = spec.geometry.is_plain and spec.border == "zero"
            return plain and present.get("bias") in (None, 2) and _SLIDE_OPERANDS.issuperset(present)


def _covers_windows(spec: FlashWindowAttention, present: Mapping[str, int | None], device: str) -> bool:
    plain = not spec.shared_query and not spec.head_shifts
    if device != "cpu":
        return plain and spec.geometry.keys is None and _WINDOW_OPERANDS.issuperset(present)
    return plain and _WINDOW_OPERANDS.issuperset(present)
