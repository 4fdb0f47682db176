"""Which ops the kernels of this package compute; the others are compiled from their written-out bodies."""

from __future__ import annotations

from collections.abc import Mapping

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec

_WINDOW_OPERANDS = frozenset({"query", "key", "value", "bias", "mask", "key_padding", "value_padding"})


_SLIDE_OPERANDS = frozenset({"query", "key", "value", "bias", "key_kernel", "key_bias", "value_kernel", "value_bias"})


def covers(spec: Spec, present: Mapping[str, int | None]) -> bool:
    """Whether the kernels of every device compute this op. present: the operands given, with the number of axes of
    those that are constants.
    """
    match spec:
        case FlashWindowAttention():
            plain = spec.geometry.keys is None and not spec.shared_query and not spec.head_shifts
            return plain and _WINDOW_OPERANDS.issuperset(present)
        case SlideAttention():
            plain = spec.geometry.is_plain and spec.border == "zero"
            return plain and present.get("bias") in (None, 2) and _SLIDE_OPERANDS.issuperset(present)
