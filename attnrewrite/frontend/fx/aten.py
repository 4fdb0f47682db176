"""The one table of ATen operators: how each is written with ONNX operators. What is not in it is opaque."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from attnrewrite.frontend.fx.aten_movement import MOVEMENT
from attnrewrite.frontend.fx.aten_pointwise import POINTWISE
from attnrewrite.frontend.fx.aten_products import PRODUCTS
from attnrewrite.frontend.fx.aten_reductions import REDUCTIONS
from attnrewrite.frontend.fx.building import Builder, Handler, Opaque, Results, Table

TABLE: Table = {**MOVEMENT, **POINTWISE, **PRODUCTS, **REDUCTIONS}

# Arguments that say where and how a result lies in memory, and the dtype, which an entry has from the result.
_OF_STORAGE = frozenset(
    {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "copy", "generator"}
)


def handler_of(name: str) -> Handler | None:
    """The entry of an operator, `aten.view.default`; None where the table has none."""
    namespace, _, rest = name.partition(".")
    return TABLE.get(rest) if namespace == "aten" else None


@cache
def _parameters(handler: Handler) -> tuple[frozenset[str], bool]:
    """What an entry takes by name, and whether it takes anything else."""
    parameters = list(inspect.signature(handler).parameters.values())[1:]
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return frozenset(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD), anything


def apply(handler: Handler, write: Builder, arguments: dict[str, Any], defaults: dict[str, Any]) -> Results:
    """Call an entry with the arguments it names. Raises Opaque where another one is not at its default."""
    taken, anything = _parameters(handler)
    given: dict[str, Any] = {}
    for name, argument in arguments.items():
        called = "x" if name == "self" else name
        if called in taken or (anything and name not in _OF_STORAGE):
            given[called] = argument
        elif name not in _OF_STORAGE and (name not in defaults or defaults[name] != argument):
            raise Opaque(f"{name}={argument}")
    return handler(write, **given)
