"""Which value a tensor holds now, where tensors share memory and are written to.

A tensor is told by identity, memory by its storage. A write to a view gives the tensor it views a new value (the view's
inverse), and what else views the same memory is read anew through its own views. So values never change, as the graph
view has it, while tensors do, as torch has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from attnrewrite.frontend.fx.aten_movement import select_scatter, slice_scatter
from attnrewrite.frontend.fx.building import Builder, Opaque
from attnrewrite.frontend.fx.calls import Call
from attnrewrite.graph import Value

_RESHAPES = frozenset(
    {
        "view",
        "_unsafe_view",
        "_reshape_alias",
        "reshape",
        "unsqueeze",
        "squeeze",
        "alias",
        "detach",
        "lift_fresh",
        "view_as",
    }
)


@dataclass
class Memory:
    """One storage. owner: whose it is when it outlives the graph ("the input x"), else empty. writes: so far."""

    owner: str = ""
    writes: int = 0
    tensors: list[Tracked] = field(default_factory=list)


@dataclass(eq=False)
class Tracked:
    """A fake tensor (held, so that its identity stays its own) and what it held after `writes` writes to its memory.

    real: the tensor itself while everything it was computed from is constant. parent, made_by, part: of a view, what it
    views, by which call, and which of the call's results it is.
    """

    fake: torch.Tensor
    memory: Memory
    value: Value
    writes: int
    real: torch.Tensor | None = None
    parent: Tracked | None = None
    made_by: Call | None = None
    part: int = 0


class Tensors:
    """All tensors met. again(call, parent's value) computes the values of a view's call anew, frozen(real tensor) the
    value of a constant; both are the reader's.
    """

    def __init__(
        self,
        write: Builder,
        again: Callable[[Call, torch.Tensor, Value], list[Value]],
        frozen: Callable[[torch.Tensor], Value],
    ) -> None:
        self._write, self._again, self._frozen = write, again, frozen
        self._by_identity: dict[int, Tracked] = {}
        self._by_storage: dict[int, Memory] = {}

    def find(self, tensor: torch.Tensor) -> Tracked | None:
        return self._by_identity.get(id(tensor))

    def add(self, tensor: torch.Tensor, value: Value, real: torch.Tensor | None = None, owner: str = "") -> Tracked:
        """A tensor that views nothing known."""
        memory = self._memory_of(tensor)
        memory.owner = memory.owner or owner
        return self._enter(Tracked(tensor, memory, value, memory.writes, real))

    def add_result(self, call: Call, part: int, tensor: torch.Tensor, value: Value, real: torch.Tensor | None) -> None:
        """A result of a call; a view where it lies in the memory of one of the arguments."""
        memory = self._memory_of(tensor)
        parents = [t for t in map(self.find, call.tensors) if t is not None and t.memory is memory]
        parent = parents[0] if parents else None
        self._enter(Tracked(tensor, memory, value, memory.writes, real, parent, call if parent else None, part))

    def value(self, tensor: torch.Tensor) -> Value:
        """What a known tensor holds now."""
        return self._current(self._by_identity[id(tensor)])

    def _memory_of(self, tensor: torch.Tensor) -> Memory:
        return self._by_storage.setdefault(tensor.untyped_storage()._cdata, Memory())

    def _enter(self, tracked: Tracked) -> Tracked:
        tracked.memory.tensors.append(tracked)
        self._by_identity[id(tracked.fake)] = tracked
        return tracked

    def _current(self, tracked: Tracked) -> Value:
        if tracked.writes == tracked.memory.writes:
            return tracked.value
        if tracked.real is not None:
            value = self._frozen(tracked.real)
        elif tracked.parent is None or tracked.made_by is None:
            raise Opaque("a tensor is read after what shares its memory was written to")
        else:
            parent = self._current(tracked.parent)
            value = self._again(tracked.made_by, tracked.parent.fake, parent)[tracked.part]
        tracked.value, tracked.writes = value, tracked.memory.writes
        return value

    def written_for_real(self, tensor: torch.Tensor) -> None:
        """The constant behind a tensor has been written to."""
        self._by_identity[id(tensor)].memory.writes += 1

    def keep_constants(self, tensor: torch.Tensor) -> None:
        """Constants read so far stay what they are, whatever is written to their memory."""
        for tracked in self._by_identity[id(tensor)].memory.tensors:
            value = self._current(tracked)
            if value.is_constant:
                value.set_constant(value.constant.copy())

    def forget_constants(self, tensor: torch.Tensor) -> None:
        """What shares the memory is constant no more."""
        for tracked in self._by_identity[id(tensor)].memory.tensors:
            self._current(tracked)
        for tracked in self._by_identity[id(tensor)].memory.tensors:
            tracked.real = None

    def store(self, tensor: torch.Tensor, value: Value) -> None:
        """A tensor has been written over with a value. Raises Opaque where a view has no inverse here."""
        tracked = self._by_identity[id(tensor)]
        chain: list[tuple[Tracked, Value]] = [(tracked, value)]
        while tracked.parent is not None:
            assert tracked.made_by is not None
            before = self._current(tracked.parent)
            value = written_through(self._write, tracked.made_by, tracked.part, before, value)
            tracked = tracked.parent
            chain.append((tracked, value))
        tracked.memory.writes += 1
        for holder, held in chain:
            holder.value, holder.writes = held, holder.memory.writes


def written_through(write: Builder, call: Call, part: int, before: Value, value: Value) -> Value:
    """What a tensor holds after a view of it has been written over: the inverse of the view."""
    name, how = call.name.split(".")[1], call.arguments
    shape = before.known_shape
    if name in _RESHAPES:
        return write.reshape(value, shape)
    match name:
        case "permute":
            order = [d % len(shape) for d in how["dims"]]
            return write.transpose(value, [order.index(k) for k in range(len(shape))])
        case "transpose":
            axes = list(range(len(shape)))
            axes[how["dim0"]], axes[how["dim1"]] = axes[how["dim1"]], axes[how["dim0"]]
            return write.transpose(value, axes)
        case "t":
            return write.transpose(value, [1, 0]) if len(shape) == 2 else value
        case "expand" if value.known_shape == shape:
            return value
        case "slice":
            if value.known_shape == shape:
                return value
            return slice_scatter(write, before, value, how["dim"], how["start"], how["end"], how["step"])
        case "select":
            return select_scatter(write, before, value, how["dim"], how["index"])
        case "unbind":
            return select_scatter(write, before, value, how["dim"], part)
        case "split" | "split_with_sizes":
            return _scattered_part(write, call, part, before, value)
    raise Opaque(f"a write through {name}")


def _scattered_part(write: Builder, call: Call, part: int, before: Value, value: Value) -> Value:
    dim = call.arguments["dim"] % len(before.known_shape)
    starts: list[Any] = [0]
    for result in call.results[:part]:
        starts.append(starts[-1] + result.shape[dim])
    return slice_scatter(write, before, value, dim, starts[-1], starts[-1] + value.known_shape[dim], 1)
