"""attnrewrite: finds local attention in vision models, proves it, fuses it, and compiles it with Apache TVM.

Names load on first use, so that importing the package costs nothing of what a caller does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnrewrite import passes as passes
    from attnrewrite import testing as testing
    from attnrewrite.api import Result, explain, inspect, load, optimize
    from attnrewrite.pipeline import Pass, Pipeline

__version__ = "0.1.0"

__all__ = ["Pass", "Pipeline", "Result", "explain", "inspect", "load", "optimize", "passes", "testing"]

_HOME = {
    "Pass": "attnrewrite.pipeline",
    "Pipeline": "attnrewrite.pipeline",
    "Result": "attnrewrite.api",
    "explain": "attnrewrite.api",
    "inspect": "attnrewrite.api",
    "load": "attnrewrite.api",
    "optimize": "attnrewrite.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
