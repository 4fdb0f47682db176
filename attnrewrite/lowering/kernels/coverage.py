"""Which ops the kernels of this package compute; the others are compiled from their written-out bodies."""

from __future__ import annotations

from collections.abc import Collection

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec

_WINDOW_OPERANDS = frozenset({"query", "key", "value", "bias", "mask", "key_padding", "value_padding"})


def covers(spec: Spec, present: Collection[str]) -> bool:
    """Whether the kernels of every device compute this op. present: names of the operands given."""
    match spec:
        case FlashWindowAttention():
            return spec.geometry.keys is None and not spec.shared_query and _WINDOW_OPERANDS.issuperset(present)
        case SlideAttention():
            return spec.border == "zero"
