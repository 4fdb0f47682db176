"""One call of an ATen operator with all its arguments named, and what it does to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

# Operators that write to running statistics and do not say so in their schema, and the argument that makes them.
_STATISTICS = {
    "aten.batch_norm.default": "training",
    "aten._batch_norm_impl_index.default": "training",
    "aten.native_batch_norm.default": "training",
    "aten.cudnn_batch_norm.default": "training",
    "aten.miopen_batch_norm.default": "training",
    "aten.instance_norm.default": "use_input_stats",
}


@dataclass(frozen=True, eq=False)
class Call:
    """A call: arguments by the names of the schema, defaults among them; results as the operator returns them."""

    target: OpOverload
    arguments: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        """Operator and overload, `aten.view.default`."""
        return str(self.target)

    @property
    def results(self) -> list[torch.Tensor]:
        """The tensors it returns."""
        return list(tensors_in(self.result))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors it reads or writes, in order."""
        return list(tensors_in(self.arguments))

    @property
    def written(self) -> list[torch.Tensor]:
        """The tensors it writes to."""
        names = [a.name for a in self.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if self.name in _STATISTICS and self.arguments[_STATISTICS[self.name]]:
            names = ["running_mean", "running_var"]
        return list(tensors_in([self.arguments[name] for name in names]))


def bound(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    arguments: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(args):
            arguments[argument.name] = args[position]
        elif argument.name in kwargs:
            arguments[argument.name] = kwargs[argument.name]
        else:
            arguments[argument.name] = argument.default_value
    return arguments


def invoke(target: OpOverload, arguments: dict[str, Any]) -> Any:
    """Call an operator with its arguments by name."""
    positional = [a for a in target._schema.arguments if not a.kwarg_only]
    named = [a for a in target._schema.arguments if a.kwarg_only]
    return target(*(arguments[a.name] for a in positional), **{a.name: arguments[a.name] for a in named})


def functional(target: OpOverload) -> OpOverload | None:
    """The operator that returns what this one writes to its first argument (`add_` -> `add`); None where there is
    none.
    """
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    if packet is None:
        return None
    overloads = [getattr(packet, n) for n in packet.overloads()]
    fitting = [o for o in overloads if _signature(o) == _signature(target) and not o._schema.is_mutable]
    named_alike = [o for o in fitting if o._overloadname == target._overloadname]
    return (named_alike or fitting or [None])[0]


def _signature(target: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in target._schema.arguments]


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from tensors_in(branch)
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from tensors_in(branch)


def mapped(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """The same lists, tuples and dicts with every tensor replaced."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: mapped(branch, function) for key, branch in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(branch, function) for branch in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(branch, function) for branch in tree)
    return tree
