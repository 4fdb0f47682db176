"""Appending to a torch.fx graph what the entries of `emit` call: every ATen call becomes a node and its fake result."""

from __future__ import annotations

import contextlib
import hashlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node as FxNode
from torch.overrides import TorchFunctionMode

from attnrewrite.dims import Dim, Extent
from attnrewrite.errors import UserError
from attnrewrite.frontend.fx.entry import dtype_of
from attnrewrite.frontend.fx.program import KNOWN_AS, Program, known_as
from attnrewrite.graph import Value

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}


class Recording(TorchFunctionMode):
    """Runs ATen calls on fake tensors and appends each to the graph, in front of its output.

    placed: nodes that will stay. fresh: those that were appended. named: all that were there before, by name.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.graph = program.module.graph
        self.output = next(n for n in self.graph.nodes if n.op == "output")
        self.placed: set[FxNode] = set()
        self.fresh: set[FxNode] = set()
        self.named = {n.name: n for n in self.graph.nodes}
        self._meta: dict[str, Any] = {}
        self._stem: str | None = None
        self._alive: list[torch.Tensor] = []  # what `_nodes` knows by identity
        self._mode = _mode_of(program)
        # Where nodes say what they return: torch.export's and Dynamo's way, if any does.
        self._said = next((key for key in KNOWN_AS if any(key in n.meta for n in self.graph.nodes)), None)
        self._fakes: dict[FxNode, Any] = {}
        self._nodes: dict[int, FxNode] = {}  # by the identity of the fake tensor
        self._constants: dict[tuple[Any, ...], FxNode] = {}
        self._symbols: dict[str, Any] = {}

    # Running

    @contextlib.contextmanager
    def running(self, stem: str | None = None, meta: dict[str, Any] | None = None) -> Iterator[None]:
        """What is called inside is appended; nothing is learned of symbols from it.

        stem: what the nodes are called. meta: what they say of where they come from.
        """
        self._stem, self._meta = stem, meta or {}
        with contextlib.ExitStack() as stack:
            if self._mode.shape_env is not None:
                stack.enter_context(self._mode.shape_env.suppress_guards())
                stack.enter_context(self._mode.shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch._C._DisableAutocast())
            stack.enter_context(self._mode)
            stack.enter_context(self)
            yield

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        args, kwargs = self._fake_arguments(args), self._fake_arguments(kwargs)
        node_args, node_kwargs = self._node_arguments(args), self._node_arguments(kwargs)
        result = func(*args, **kwargs)
        node = self.call(func, node_args, node_kwargs, result)
        if isinstance(result, list | tuple):
            for position, element in enumerate(result):
                if isinstance(element, torch.Tensor):
                    self.call(operator.getitem, (node, position), {}, element)
        return result

    def call(self, target: Any, args: Any, kwargs: Any, result: Any) -> FxNode:
        """Append a call that returns this (fake tensors)."""
        with self.graph.inserting_before(self.output):
            node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs), self._stem)
        node.meta.update(self._meta)
        self.placed.add(node)
        self.fresh.add(node)
        self.returns(node, result)
        return node

    def returns(self, node: FxNode, result: Any) -> None:
        """Say what a node returns on fake tensors."""
        self._fakes[node] = result
        if isinstance(result, torch.Tensor):
            self._stands_for(result, node)
        if self._said is not None:
            node.meta[self._said] = result

    def _stands_for(self, fake: torch.Tensor, node: FxNode) -> None:
        self._alive.append(fake)
        self._nodes[id(fake)] = node

    def node_of(self, fake: torch.Tensor) -> FxNode:
        """The node that a fake tensor stands for."""
        return self._nodes[id(fake)]

    def run_again(self, node: FxNode) -> None:
        """Update what a node of ATen says that it returns, its arguments having changed."""
        if not isinstance(node.target, OpOverload) or "val" not in node.meta:
            return
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self.value_of)
        with self.running(), torch._C.DisableTorchFunction():
            self.returns(node, node.target(*args, **kwargs))

    def _fake_arguments(self, arguments: Any) -> Any:
        """Tensors that an entry has made become constants of the graph."""
        return torch.utils._pytree.tree_map_only(
            torch.Tensor,
            lambda t: t if isinstance(t, FakeTensor) else self.fake_of(self.constant(t, "positions")),
            arguments,
        )

    def _node_arguments(self, arguments: Any) -> Any:
        if isinstance(arguments, torch.Tensor):
            return self._nodes[id(arguments)]
        if isinstance(arguments, torch.SymInt):
            return self.symbolic(arguments)
        if isinstance(arguments, list | tuple):
            return type(arguments)(map(self._node_arguments, arguments))
        if isinstance(arguments, dict):
            return {k: self._node_arguments(v) for k, v in arguments.items()}
        return arguments

    # Fake results

    def value_of(self, node: FxNode) -> Any:
        """What a node returns on fake tensors."""
        for known in (self._fakes, self.program.fakes):
            if node in known:
                return known[node]
        for key in KNOWN_AS:
            if key in node.meta:
                return node.meta[key]
        value = self.program.values.get(node)
        if not isinstance(value, Value):
            return value
        with torch.no_grad(), self._mode:
            shape = [self.size_of(e) for e in value.known_shape]
            assert value.dtype is not None
            made = self._fakes[node] = torch.empty(shape, dtype=dtype_of(value.dtype), device=self.device)
        return made

    def fake_of(self, node: FxNode) -> torch.Tensor:
        """A fake tensor that stands for this node alone."""
        fake = self.value_of(node)
        assert isinstance(fake, torch.Tensor), f"{node} returns no tensor"
        if self._nodes.get(id(fake), node) is not node:  # two nodes return one tensor
            with torch.no_grad(), self._mode, torch._C.DisableTorchFunction():
                fake = fake.view_as(fake)
        self._fakes[node] = fake
        self._stands_for(fake, node)
        return fake

    @property
    def device(self) -> torch.device:
        """Where the module's tensors are."""
        tensors = [*self.program.module.parameters(), *self.program.module.buffers()]
        if self.program.exported is not None:
            tensors += self.program.exported.state_dict.values()
        return tensors[0].device if tensors else torch.device("cpu")

    # Symbols

    def size_of(self, extent: Extent) -> Any:
        """An extent as a number, or as the SymInt that the fake tensors have."""
        if not isinstance(extent, Dim):
            return extent
        total: Any = extent.constant
        for symbol, factor in extent.terms:
            node, axis = self._axis_of(symbol)
            total = total + factor * self.value_of(node).shape[axis]
        return total

    def _axis_of(self, symbol: str) -> tuple[FxNode, int]:
        if symbol not in self.program.symbols:
            raise UserError(f"the extent {symbol} is no input's, so the rewritten torch.fx graph cannot compute it")
        return self.program.symbols[symbol]

    def size(self, size: Any) -> Any:
        """A size, or several, as arguments of nodes."""
        if isinstance(size, torch.Size | list | tuple):
            return [self.size(s) for s in size]
        return self.symbolic(size) if isinstance(size, torch.SymInt) else size

    def symbolic(self, size: torch.SymInt) -> Any:
        """A size as a number, or as a node that computes it from the inputs' sizes."""
        found = size.node.maybe_as_int()
        return found if found is not None else self._expression(size.node.expr)

    def _expression(self, expression: sympy.Expr) -> Any:
        name = str(expression)
        if expression.is_Integer:
            return int(expression)
        if name not in self._symbols:
            if name in self.program.symbols or expression.is_Symbol:
                node, axis = self._axis_of(name)
                size = self.value_of(node).shape[axis]
                self._symbols[name] = self._size(torch.ops.aten.sym_size.int, (node, axis), size)
            else:
                target = _ARITHMETIC.get(type(expression).__name__)
                if target is None:
                    raise UserError(f"the extent {name} of the rewritten torch.fx graph cannot be computed")
                parts = [self._expression(e) for e in expression.args]
                result = parts[0]
                for part in parts[1:]:
                    sizes = [self.value_of(p) if isinstance(p, FxNode) else p for p in (result, part)]
                    result = self._size(target, (result, part), target(*sizes))
                self._symbols[name] = result
        return self._symbols[name]

    def _size(self, target: Any, args: tuple[Any, ...], result: Any) -> FxNode:
        """A node that computes a size: one that is there already where there is one."""
        for node in self.graph.nodes:
            if node.target == target and node.args == args and node in self.placed:
                return node
        return self.call(target, args, {}, result)

    # Constants

    def constant(self, tensor: torch.Tensor, stem: str) -> FxNode:
        """A node that returns this tensor: a buffer beside the state_dict, or a constant of an exported program.

        Equal tensors are one.
        """
        with unset_fake_temporarily():
            plain = tensor.detach().cpu().contiguous()
            digest = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            key = (digest, tensor.dtype, tuple(tensor.shape), tensor.device)
            if key not in self._constants:
                new = self._lifted if self.program.exported is not None else self._buffer
                node = self._constants[key] = new(tensor, stem)
                self.returns(node, self._mode.from_tensor(tensor, static_shapes=True))
        return self._constants[key]

    def _free_name(self, stem: str) -> str:
        clean = "".join(c if c.isalnum() else "_" for c in stem).strip("_") or "constant"
        taken = {n.name for n in self.graph.nodes} | set(self.program.module._buffers)
        if self.program.exported is not None:
            taken |= {*self.program.exported.constants, *self.program.exported.state_dict}
        name, count = f"attnrewrite_{clean}", 0
        while name in taken or hasattr(self.program.module, name):
            count += 1
            name = f"attnrewrite_{clean}_{count}"
        return name

    def _buffer(self, tensor: torch.Tensor, stem: str) -> FxNode:
        name = self._free_name(stem)
        self.program.module.register_buffer(name, tensor, persistent=False)
        with self.graph.inserting_before(self.output):
            node = self.graph.get_attr(name)
        self.placed.add(node)
        return node

    def attribute(self, name: str) -> FxNode:
        """A node that returns a parameter or buffer by its qualified name."""
        key = (name,)
        if key not in self._constants:
            with self.graph.inserting_before(self.output):
                node = self._constants[key] = self.graph.get_attr(name)
            self.placed.add(node)
            *path, last = name.split(".")
            tensor = getattr(self.program.module.get_submodule(".".join(path)), last)
            with unset_fake_temporarily():
                self.returns(node, self._mode.from_tensor(tensor.detach(), static_shapes=True))
        return self._constants[key]

    def _lifted(self, tensor: torch.Tensor, stem: str) -> FxNode:
        exported, name = self.program.exported, self._free_name(stem)
        assert exported is not None
        specs = exported.graph_signature.input_specs
        at = next((k for k, s in enumerate(specs) if s.kind is InputKind.USER_INPUT), len(specs))
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        following = placeholders[at] if at < len(placeholders) else next(iter(self.graph.nodes))
        with self.graph.inserting_before(following):
            node = self.graph.placeholder(name)
        specs.insert(at, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name))
        exported.constants[name] = tensor
        return node


def _mode_of(program: Program) -> FakeTensorMode:
    """The mode of the fake tensors that the nodes return, or a new one."""
    known = map(known_as, program.module.graph.nodes)
    for fake in [*known, *program.fakes.values()]:
        if isinstance(fake, FakeTensor):
            return fake.fake_mode
    return FakeTensorMode(shape_env=None)
