"""The two ops as operators of PyTorch, `torch.ops.attnrewrite.*`; importing this package registers them."""

from __future__ import annotations

from attnrewrite.operators import register, schema

__all__ = ["register", "schema"]
