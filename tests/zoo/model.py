"""How a model of the zoo is written down: a real model of some package, and what must be said of its softmaxes.

A module of this folder holds the models of one package (or of a few small ones) as `MODELS`; `tests.zoo.models` joins
them. Parameters are random, nothing is downloaded; depth and width are small where the model allows, for what is under
test is the spelling, and the named default models follow at full size.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnrewrite.localattention.site import Kind, Site

if TYPE_CHECKING:
    import torch

TORCHSCRIPT, DYNAMO = "torchscript", "dynamo"
BOTH = (TORCHSCRIPT, DYNAMO)
OPSETS = {TORCHSCRIPT: 17, DYNAMO: 18}

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Model:
    """One model.

    package: what is imported, the name of the distribution where it differs after a colon. attention: what attention
    it has, in the field's words. build: the torch module. inputs: shapes [batch, ...] of float32 inputs; ids: the
    inputs are integers below it. rewritten: sites by kind. left: sites that stay, by a regular expression for the
    reason. exporters: those worth a try; what one of them says where it cannot write the model stands in the table.
    full: a named default model, at full size.
    """

    name: str
    package: str
    attention: str
    build: Callable[[], Any]
    inputs: tuple[Shape, ...]
    rewritten: Mapping[Kind, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    ids: int = 0
    exporters: tuple[str, ...] = BOTH
    full: bool = False

    @property
    def module_name(self) -> str:
        return self.package.partition(":")[0]

    @property
    def distribution(self) -> str:
        """What pip calls the package."""
        return self.package.rpartition(":")[2].replace("_", "-")

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module_name) is not None

    def examples(self) -> tuple[torch.Tensor, ...]:
        """The inputs to export with."""
        import torch

        generator = torch.Generator().manual_seed(1)
        if self.ids:
            return tuple(torch.randint(self.ids, shape, generator=generator) for shape in self.inputs)
        return tuple(torch.randn(shape, generator=generator) for shape in self.inputs)

    def complaints(self, sites: Sequence[Site]) -> list[str]:
        """Where the sites of an export are not as expected, one sentence each."""
        said = []
        found = Counter(site.kind for site in sites if site.verdict == "rewrite")
        for kind in {*found, *self.rewritten}:
            if found[kind] != self.rewritten.get(kind, 0):
                said.append(f"{found[kind]} of kind {kind} rewritten, expected {self.rewritten.get(kind, 0)}")
        room = dict(self.left)
        for site in (s for s in sites if s.verdict == "leave"):
            fitting = next((r for r, count in room.items() if count and re.search(r, site.reason)), None)
            if fitting is None:
                said.append(f"{site.node} is left: {site.kind}, {site.reason} (at {site.reason_node})")
            else:
                room[fitting] -= 1
        said += [f"{count} more sites should be left because {reason!r}" for reason, count in room.items() if count]
        return said


def adapted(module: Any, call: Callable[..., Any]) -> Any:
    """A module whose forward is `call(module, *inputs)`: for models that take keywords or return more than a tensor."""
    from torch import nn

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any) -> Any:
            return call(self.module, *inputs)

    return Adapted()


def imported(name: str) -> Any:
    """A module by its dotted name; torchvision is made importable first, for many packages need it."""
    from examples.exporting import import_torchvision

    import_torchvision()
    return importlib.import_module(name)


def built(module: str, name: str, *arguments: Any, **options: Any) -> Any:
    """`from module import name; name(*arguments, **options)`."""
    return getattr(imported(module), name)(*arguments, **options)


def imported_alone(name: str, absent: Sequence[str] = ()) -> Any:
    """A submodule without its packages' own `__init__`, which imports what the architecture does not need.

    absent: modules that it imports and does not use here (to fetch weights, say); they need not be installed.
    """
    from examples.exporting import import_torchvision

    import_torchvision()
    for module in absent:
        sys.modules.setdefault(module, types.ModuleType(module))
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent in sys.modules:
            continue
        if depth == 1:
            spec = importlib.util.find_spec(parent)
            assert spec is not None and spec.submodule_search_locations is not None, name
            where = list(spec.submodule_search_locations)
        else:
            where = [f"{folder}/{parts[depth - 1]}" for folder in sys.modules[".".join(parts[: depth - 1])].__path__]
        package = types.ModuleType(parent)
        package.__path__ = where
        sys.modules[parent] = package
    return importlib.import_module(name)
