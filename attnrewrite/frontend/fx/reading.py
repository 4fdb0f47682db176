"""The run of one torch.fx graph on fake tensors, written down node by node as the graph view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from attnrewrite.dims import Dim
from attnrewrite.errors import UserError
from attnrewrite.frontend.fold import GROWTH_LIMIT_BYTES
from attnrewrite.frontend.fx.aliases import Tensors
from attnrewrite.frontend.fx.aten import apply, handler_of
from attnrewrite.frontend.fx.building import Builder, Opaque, as_symbol
from attnrewrite.frontend.fx.calls import Call, functional, invoke, mapped, tensors_in
from attnrewrite.frontend.fx.program import TORCH_DOMAIN, Expansion, Operand, Program
from attnrewrite.frontend.fx.record import Recorder, Runner, is_autocast, is_fake, quiet
from attnrewrite.frontend.fx.tensors import extent_of, loader, numpy_dtype, shape_of, tensor_of
from attnrewrite.graph import Node, Value


class Mutated(Exception):
    """Tensors that outlive the graph are written to, but were taken for constants."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names


class State:
    """The parameters and buffers of a module by identity: what they are called and what they hold.

    contents: arrays in place of what some of them hold. mutable: names of those that the graph writes to.
    """

    def __init__(self, contents: Mapping[str, np.ndarray], mutable: frozenset[str]) -> None:
        self.contents, self.mutable = contents, mutable
        self._names: dict[int, str] = {}
        self._held: list[torch.Tensor] = []

    def name(self, tensor: torch.Tensor, name: str) -> None:
        self._held.append(tensor)
        self._names.setdefault(id(tensor), name)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        return self._names.get(id(tensor))

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the tensor holds, or what is to be put in its place."""
        name = self._names.get(id(tensor))
        if name is None or name not in self.contents:
            return tensor.detach()
        return tensor_of(np.asarray(self.contents[name])).to(tensor.dtype).reshape(tensor.shape)


class Reading:
    """Runs the graph once. program: filled while it runs; write: holds the nodes."""

    def __init__(self, program: Program, mode: FakeTensorMode, state: State) -> None:
        self.program, self.mode, self.state = program, mode, state
        self.write = Builder()
        self.tensors = Tensors(self.write, self._again, self._frozen)
        self._node: torch.fx.Node | None = None
        self._start = 0
        self._seen: dict[torch.fx.Node, Value] = {}
        self._replaces = self._stays = False
        self._expansions: dict[torch.fx.Node, tuple[list[Node], dict[torch.fx.Node, Value], bool, bool]] = {}
        self._fakes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the real tensor is held, for its identity
        self._mutated: set[str] = set()
        self.inputs: set[Value] = set()
        self.outputs: list[Value] = []

    # Running

    def run(self, arguments: list[Any]) -> Any:
        """What the graph returns for these arguments (fake tensors and whatever else it takes)."""
        recorder = Recorder(self._whole, self._hear)
        runner = Runner(self.program.module, recorder, self._before, self._after, self._attribute)
        with quiet(self.mode):
            result = runner.run(*arguments)
        if self._mutated:
            raise Mutated(frozenset(self._mutated))
        return result

    def _whole(self, target: OpOverload) -> bool:
        return handler_of(str(target)) is not None

    def _before(self, node: torch.fx.Node, argument: Callable[[torch.fx.Node], Any]) -> None:
        self._node, self._start = node, len(self.write.graph.nodes)
        self.write.stem = node.name
        self._replaces = self._stays = False
        self._seen = {}
        for read in node.all_input_nodes:
            held = self.program.values.get(read)
            if not isinstance(held, Value):
                continue
            tracked = self.tensors.find(argument(read))
            if tracked is not None and (now := self.tensors.value(tracked.fake)) is not held:
                self._seen[read] = now

    def _after(self, node: torch.fx.Node, result: Any) -> Any:
        result = mapped(result, lambda t: self._fake(t) if not is_fake(t) else t)
        values = mapped(result, self._known)
        made = self.write.graph.nodes[self._start :]
        own = {output for n in made for output in n.outputs}
        results = list(_values_in(values))
        for position, value in enumerate(results):
            if value in own or (value.is_constant and value.source is None):
                self._named(value, node.name if len(results) == 1 else f"{node.name}_{position}")
        for n in made:
            n.source = node
            n.name = node.name if n.op == "Softmax" or n is made[-1] else n.output.name
        if node.op in ("placeholder", "get_attr"):
            for value in results:
                value.source = node
        if node.op == "output":
            self.outputs = results
        else:
            self.program.values[node] = values
            if "val" not in node.meta:
                self.program.fakes[node] = result
            if made or self._replaces or self._stays or self._seen:
                self._expansions[node] = (list(made), dict(self._seen), self._replaces, self._stays)
        for value in results:
            self.write.known(value)
        return result

    def _named(self, value: Value, name: str) -> None:
        """Call a result what its torch.fx node is called; a constant is named once."""
        if value.is_constant:
            value.source = self._node
        value.name = self.write.unique(name)

    def _attribute(self, name: Any, attribute: Any) -> Any:
        """What a get_attr node returns."""
        if isinstance(attribute, torch.Tensor):
            self.state.name(attribute, str(name))
        return attribute

    def _known(self, tensor: torch.Tensor) -> Value:
        if self.tensors.find(tensor) is None:
            raise UserError(f"the torch.fx node {self._node} returns a tensor that no operator computed")
        return self.tensors.value(tensor)

    # Tensors

    def enter(self, tensor: torch.Tensor, name: str, owner: str) -> Value:
        """An input of the graph: a fake tensor that is no constant."""
        known = self.tensors.find(tensor)
        if known is not None:
            return known.value
        value = Value(self.write.unique(name), shape_of(tensor.shape), numpy_dtype(tensor.dtype))
        self.tensors.add(tensor, value, owner=owner)
        self.inputs.add(value)
        self.write.known(value)
        return value

    def _fake(self, real: torch.Tensor) -> torch.Tensor:
        """The fake tensor of a real one: of a parameter or a buffer, or of a literal in the model's code."""
        if id(real) in self._fakes:
            return self._fakes[id(real)][1]
        with unset_fake_temporarily():
            fake = self.mode.from_tensor(real, static_shapes=True)
        self._fakes[id(real)] = (real, fake)
        self.hold(fake, real, self.state.name_of(real))
        return fake

    def hold(self, fake: torch.Tensor, real: torch.Tensor, name: str | None) -> Value:
        """A parameter or a buffer (by name), or a literal of the code: a constant, unless the graph writes to it."""
        if self.tensors.find(fake) is not None:
            return self.tensors.value(fake)
        owner = "" if name is None else f"the tensor {name}"
        unknown = is_fake(real) or real.is_meta  # a model without weights
        if name is not None and (name in self.state.mutable or unknown):
            value = Value(self.write.unique(name), shape_of(fake.shape), numpy_dtype(fake.dtype))
            self.write.graph.nodes.append(Node("state", [], [value], {"name": name}, name, TORCH_DOMAIN))
            self.tensors.add(fake, value, owner=owner)
            return value
        with unset_fake_temporarily():
            contents = self.state.real(real) if name is not None else real.detach().clone()
        value = self._frozen(contents)
        if name is not None:
            value.name = self.write.unique(name)
            value.source = name
            self.program.names[value] = name
        # What follows from a stand-in is read call by call, for it will be computed anew at every call of the model.
        self.tensors.add(fake, value, None if name in self.state.contents else contents, owner)
        return value

    def _frozen(self, real: torch.Tensor) -> Value:
        """A constant that is read when somebody asks for it."""
        stem = self._node.name if self._node is not None else "constant"
        return Value(self.write.unique(stem), tuple(real.shape), numpy_dtype(real.dtype), loader(real))

    # Calls

    def _hear(self, target: OpOverload, arguments: dict[str, Any]) -> Any:
        arguments = mapped(arguments, lambda t: t if is_fake(t) else self._fake(t))
        if target is torch.ops.aten.index.Tensor:
            arguments["indices"] = self._whole_numbers(arguments["indices"])
        call = Call(target, arguments, None)
        reals = self._computed(call)
        try:
            result = invoke(target, arguments)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if reals is None:
                raise
            result = mapped(reals, lambda t: self.mode.from_tensor(t, static_shapes=True))
        call = Call(target, arguments, result)
        try:
            if call.written:
                self._write(call, reals)
            else:
                self._results(call, reals)
        except Opaque as error:
            raise self._refused(f"{error}: {call.name}") from error
        return result

    def _whole_numbers(self, indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Indices with constant tensors of bools as the positions at which they are true."""
        found: list[torch.Tensor | None] = []
        for index in indices:
            tracked = None if index is None or index.dtype != torch.bool else self.tensors.find(index)
            if tracked is None or tracked.real is None:
                found.append(index)
                continue
            with unset_fake_temporarily():
                positions = tracked.real.nonzero().unbind(1)
            found += [self._fake(p) for p in positions]
        return found

    def _refused(self, why: str) -> UserError:
        return UserError(f"the torch.fx node {self._node} cannot be read: {why}")

    def _computed(self, call: Call) -> Any:
        """The results of a call on constants, computed; None where an argument is no constant, or is written to and
        outlives the graph, or the result is no fact.
        """
        if torch.Tag.nondeterministic_seeded in call.target.tags or any(_symbolic(a) for a in call.arguments.values()):
            return None
        tracked = [self.tensors.find(t) for t in call.tensors]
        if any(t is None or t.real is None for t in tracked):
            return None
        written = call.written
        if any(t.memory.owner for w in written if (t := self.tensors.find(w)) is not None):
            return None
        for tensor in written:
            self.tensors.keep_constants(tensor)
        with unset_fake_temporarily():
            real = mapped(call.arguments, lambda t: self._real(t))
            try:
                result = invoke(call.target, real)
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                if written:
                    raise self._refused(str(error)) from error
                return None
            if call.name.startswith(("aten.empty", "aten.new_empty")):
                mapped(result, lambda t: t.zero_())
        read = sum(t.numel() * t.element_size() for t in tensors_in(real))
        made = sum(t.numel() * t.element_size() for t in tensors_in(result))
        return result if written or made <= read + GROWTH_LIMIT_BYTES else None

    def _real(self, tensor: torch.Tensor) -> torch.Tensor:
        tracked = self.tensors.find(tensor)
        assert tracked is not None and tracked.real is not None
        return tracked.real

    def _results(self, call: Call, reals: Any) -> None:
        """Give every new result of a call its value."""
        fresh = [(k, t) for k, t in enumerate(call.results) if self.tensors.find(t) is None]
        if not fresh:
            return
        if reals is not None:
            real = list(tensors_in(reals))
            for k, tensor in fresh:
                value = self._cast(call, tensor) if is_autocast(call.target) else self._frozen(real[k])
                self.tensors.add_result(call, k, tensor, value, real[k])
            return
        values = self._values(call.target, call.arguments, call.results)
        for k, tensor in fresh:
            self.tensors.add_result(call, k, tensor, values[k], None)

    def _cast(self, call: Call, tensor: torch.Tensor) -> Value:
        """A constant that autocast converts for an operator: no torch.fx node of its own computes it, so it stays a
        node of the graph view until it is folded, by which a parameter's is computed anew at every call.
        """
        dtype = numpy_dtype(tensor.dtype)
        if dtype is None:
            raise self._refused(f"autocast to {tensor.dtype}")
        return self.write.cast(self.tensors.value(call.tensors[0]), dtype)

    def _again(self, call: Call, parent: torch.Tensor, value: Value) -> list[Value]:
        """The values of a view's call, its parent holding another value."""
        return self._values(call.target, call.arguments, call.results, {id(parent): value})

    def _values(
        self,
        target: OpOverload,
        arguments: dict[str, Any],
        results: list[torch.Tensor],
        instead: Mapping[int, Value] | None = None,
    ) -> list[Value]:
        """The values of a call's results: by the table, or of an opaque node."""
        held = instead or {}

        def value_of(tensor: torch.Tensor) -> Value:
            return held[id(tensor)] if id(tensor) in held else self.tensors.value(tensor)

        read = mapped(arguments, value_of)
        self.write.like([shape_of(t.shape) for t in results], [numpy_dtype(t.dtype) for t in results])
        handler = handler_of(str(target))
        nodes = self.write.graph.nodes
        start = len(nodes)
        if handler is not None:
            defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
            try:
                found = apply(handler, self.write, _extents(read), defaults)
                listed = [found] if isinstance(found, Value) else list(found)
                known = [v if v is not None else self._unknown(t) for v, t in zip(listed, results, strict=True)]
                self._checked(target, known)
                return known
            except (Opaque, ArithmeticError):
                del nodes[start:]
        return self._opaque(target, read)

    def _checked(self, target: OpOverload, values: list[Value]) -> None:
        """An entry gives what torch gives, or it is wrong."""
        for value, shape, dtype in zip(values, self.write.shapes, self.write.dtypes, strict=True):
            if value.producer is not None and (value.shape, value.dtype) != (shape, dtype):
                raise AssertionError(f"{target} returns {dtype}{list(shape)}, its entry {value}")

    def _unknown(self, tensor: torch.Tensor) -> Value:
        """A result that the entry does not compute; whoever reads it finds no producer."""
        return Value(self.write.unique(f"{self.write.stem}_unused"), shape_of(tensor.shape), numpy_dtype(tensor.dtype))

    def _opaque(self, target: OpOverload, read: dict[str, Any], shapes: Any = None) -> list[Value]:
        inputs = list(_values_in(read))
        positions = {id(v): k for k, v in reversed(list(enumerate(inputs)))}
        arguments = _with_operands(read, positions)
        outputs = [
            Value(self.write.unique(f"{self.write.stem}_{target._schema.name.split('::')[1]}"), shape, dtype)
            for shape, dtype in zip(self.write.shapes, self.write.dtypes, strict=True)
        ]
        attributes = {"target": target, "arguments": _extents(arguments)}
        self.write.graph.nodes.append(Node(str(target), inputs, outputs, attributes, "", TORCH_DOMAIN))
        return outputs

    # Writes

    def _write(self, call: Call, reals: Any) -> None:
        written = call.written
        tracked = [self.tensors.find(t) for t in written]
        outlives = [t.memory.owner for t in tracked if t is not None and t.memory.owner]
        if outlives:
            self._write_outside(call, outlives[0])
            return
        self._replaces = True
        if reals is not None:
            for tensor in written:
                self.tensors.written_for_real(tensor)
            return
        for tensor in written:
            self.tensors.forget_constants(tensor)
        target = functional(call.target)
        if len(written) != 1 or target is None or written[0] is not call.arguments["self"]:
            raise Opaque("a write that has no functional form")
        (tensor,) = written
        shape, dtype = shape_of(tensor.shape), numpy_dtype(tensor.dtype)
        value = self._values(target, call.arguments, [self._result_of(target, call)])[0]
        if value.dtype != dtype and dtype is not None:
            value = self.write.cast(value, dtype)
        self.tensors.store(tensor, self.write.expand(value, shape))

    def _result_of(self, target: OpOverload, call: Call) -> torch.Tensor:
        """What the functional operator returns: it may promote where the write converts back."""
        result = invoke(target, call.arguments)
        assert isinstance(result, torch.Tensor)
        return result

    def _write_outside(self, call: Call, owner: str) -> None:
        """The node stays where it is; nobody else may have read what it writes over."""
        self._stays = True
        values = [self.tensors.value(t) for t in call.written]
        for tensor, value in zip(call.written, values, strict=True):
            tracked = self.tensors.find(tensor)
            assert tracked is not None
            if value.is_constant:
                self._mutated.add(self.program.names[self._root(tracked).value])
                continue
            for n in self.write.graph.nodes[: self._start]:
                if value in n.inputs:
                    raise UserError(
                        f"the torch.fx node {self._node} writes to {owner}, which {n.label} has read before; "
                        "a graph that is rewritten must not depend on when that happens"
                    )
        fresh = [t for t in call.results if self.tensors.find(t) is None]
        tensors = [*fresh, *call.written]
        read = mapped(call.arguments, self.tensors.value)
        self.write.like([shape_of(t.shape) for t in tensors], [numpy_dtype(t.dtype) for t in tensors])
        outputs = self._opaque(call.target, read)
        for k, tensor in enumerate(fresh):
            self.tensors.add_result(call, k, tensor, outputs[k], None)
        for tensor, value in zip(call.written, outputs[len(fresh) :], strict=True):
            self.tensors.store(tensor, value)

    def _root(self, tracked: Any) -> Any:
        while tracked.parent is not None:
            tracked = tracked.parent
        return tracked

    # The end

    def finished(self) -> None:
        """Say in the program which nodes stand for which torch.fx node, as they are now."""
        for node, (nodes, seen, replaces, stays) in self._expansions.items():
            own = {output for n in nodes for output in n.outputs}
            reads = dict.fromkeys(v for n in nodes for v in n.inputs if v is not None and v not in own)
            inputs = tuple(tuple(n.inputs) for n in nodes)
            self.program.expansions[node] = Expansion(tuple(nodes), inputs, tuple(reads), replaces, stays, seen)
        for node, value in self.program.values.items():
            for axis, extent in enumerate(value.shape or () if isinstance(value, Value) else ()):
                if isinstance(extent, Dim) and (symbol := as_symbol(extent)) is not None:
                    self.program.symbols.setdefault(symbol, (node, axis))


def _symbolic(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(map(_symbolic, argument))
    return isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _extents(tree: Any) -> Any:
    """Symbolic sizes as extents."""
    if isinstance(tree, torch.SymInt):
        return extent_of(tree)
    if isinstance(tree, dict):
        return {key: _extents(branch) for key, branch in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_extents(branch) for branch in tree]
    return tree


def _values_in(tree: Any) -> Any:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _values_in(branch)
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _values_in(branch)


def _with_operands(tree: Any, positions: dict[int, int]) -> Any:
    if isinstance(tree, Value):
        return Operand(positions[id(tree)])
    if isinstance(tree, dict):
        return {key: _with_operands(branch, positions) for key, branch in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_with_operands(branch, positions) for branch in tree]
    return tree
