"""A second entry of a CUDA library, which replays launches: one call of the driver in place of one for each kernel.

*Matches*     runs of launches that touch nothing but memory of the model's own, weights and constants.
*Rewrites to* a function of each run, called through `vm.builtin.cuda_graph.run_or_capture`: the virtual machine
              captures it as a CUDA graph in the first call and launches the graph in those that follow. The memory they
              work in comes from another function, through `vm.builtin.cuda_graph.get_cached_alloc`, and is kept.
*Exact when*  a captured launch finds its operands where they were when it was captured: memory that is kept, and
              weights, of which every call must be given the same tensors. What reads an input or writes an output is
              launched one by one, so that callers may give and take other tensors each time.
*Declines*    models with symbolic extents, with outputs in kept memory, or with fewer than two such launches in a row.

TVM 0.27 has a pass of this name (RewriteCUDAGraph), which finds nothing to capture since sizes are plain numbers there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tvm import IRModule, ir, relax, tirx
from tvm.relax.analysis import free_vars
from tvm.relax.op import call_builtin_with_ctx
from tvm.relax.utils import copy_with_new_vars

# Fewer launches than this are no faster as one.
_LEAST = 2

_ALLOCATE = "relax.memory.alloc_storage"
# Of memory that is kept: what only says how it is to be read.
_VIEWS = ("relax.memory.alloc_tensor", "relax.reshape")
_OUTPUT = "relax.builtin.alloc_tensor"


def add_replayed(mod: IRModule, entry: str, name: str, weights: int) -> IRModule | None:
    """The module with `name` beside `entry`: the same function, its launches captured. None: nothing to capture.

    weights: how many of the last parameters are the same in every run. The module is one whose memory is planned, and
    whose functions that are no kernels consist of one block.
    """
    function = mod[entry]
    if not _is_static(function):
        return None
    plan = _Plan(mod, function, weights)
    if not plan.regions or plan.returns_kept_memory:
        return None
    builder = relax.BlockBuilder(mod)
    allocation = builder.add_func(plan.allocation(), f"{name}_memory")
    captured = [builder.add_func(plan.captured(r), f"{name}_launches_{k}") for k, r in enumerate(plan.regions)]
    builder.add_func(plan.entry(allocation, captured), name)
    return builder.get()


def _is_static(function: relax.Function) -> bool:
    """Whether every extent of the parameters is a number."""
    shapes = [parameter.ty.shape for parameter in function.params]
    return all(isinstance(extent, tirx.IntImm) for shape in shapes for extent in shape)


class _Plan:
    """Which bindings make memory that is kept, and which of the others are launches to capture.

    regions: runs of at least _LEAST such launches. shared: what the kept memory is called by those others.
    """

    def __init__(self, mod: IRModule, function: relax.Function, weights: int) -> None:
        self._function = function
        self._constant: set[Any] = set(function.params[len(function.params) - weights :])
        self._memory_parts: set[Any] = set()
        self._kept: list[Any] = []
        self._rest: list[Any] = []
        regions: list[list[Any]] = [[]]
        (block,) = function.body.blocks
        for binding in block.bindings:
            if _is_allocation(binding.value) or _is_view(binding.value, self._memory_parts):
                self._memory_parts.add(binding.var)
                self._kept.append(binding)
                continue
            self._rest.append(binding)
            if _is_view(binding.value, self._constant):
                self._constant.add(binding.var)
            elif self._is_captured(mod, binding.value):
                regions[-1].append(binding)
            elif not _calls(binding.value, _OUTPUT):
                regions.append([])
        self.regions = [region for region in regions if len(region) >= _LEAST]
        used = {v for binding in self._rest for v in free_vars(binding.value)}
        self.shared = [binding.var for binding in self._kept if binding.var in used]

    def _is_captured(self, mod: IRModule, value: Any) -> bool:
        if not isinstance(value, relax.Call) or not isinstance(value.op, ir.GlobalVar):
            return False
        return isinstance(mod[value.op], tirx.PrimFunc) and _are_among(value.args, self._constant, self._memory_parts)

    @property
    def returns_kept_memory(self) -> bool:
        """Whether an output, or a tuple of them, lies in memory that the next run would write to."""
        tuples = [binding.value for binding in self._rest if not isinstance(binding.value, relax.Call)]
        returned = [*tuples, self._function.body.body]
        return any(v in self._memory_parts for value in returned for v in free_vars(value))

    def allocation(self) -> relax.Function:
        """What is shared, as a tuple."""
        memory = self._memory()
        together = relax.VarBinding(memory, relax.Tuple(self.shared))
        return _function([], [*self._kept, together], memory, memory.ty)

    def captured(self, region: list[Any]) -> relax.Function:
        """The launches of a region, on the shared memory and the weights it uses. It returns the memory: anything but
        nothing.
        """
        memory = self._memory()
        bindings = [*self._taken(memory, _operands(region)), *region]
        return _function([memory, *self._weights(region)], bindings, memory, memory.ty)

    def entry(self, allocation: ir.GlobalVar, captured: list[ir.GlobalVar]) -> relax.Function:
        """The original, its memory taken from the first function and its regions from the others."""
        inside = {binding.var for region in self.regions for binding in region}
        outside = {v for binding in self._rest if binding.var not in inside for v in free_vars(binding.value)}
        memory = self._memory()
        bindings = [relax.VarBinding(memory, _builtin("get_cached_alloc", allocation, memory.ty, 0))]
        bindings += self._taken(memory, outside)
        last = {region[-1].var: number for number, region in enumerate(self.regions)}
        for binding in self._rest:
            if binding.var in last:
                number = last[binding.var]
                operands = relax.Tuple([memory, *self._weights(self.regions[number])])
                replayed = _builtin("run_or_capture", captured[number], memory.ty, number, operands)
                bindings.append(relax.VarBinding(relax.Var(f"replayed_{number}", memory.ty), replayed))
            elif binding.var not in inside:
                bindings.append(binding)
        return _function(self._function.params, bindings, self._function.body.body, self._function.ret_ty)

    def _memory(self) -> relax.Var:
        """A variable for everything that is shared."""
        return relax.Var("memory", relax.TupleType([variable.ty for variable in self.shared]))

    def _taken(self, memory: relax.Var, wanted: Iterable[Any]) -> list[Any]:
        """The parts of the memory that are wanted, bound to their variables."""
        parts = set(wanted)
        return [
            relax.VarBinding(variable, relax.TupleGetItem(memory, index))
            for index, variable in enumerate(self.shared)
            if variable in parts
        ]

    def _weights(self, region: list[Any]) -> list[Any]:
        shared = set(self.shared)
        return [variable for variable in _operands(region) if variable not in shared]


def _is_allocation(value: Any) -> bool:
    """Whether it is memory of a size known now."""
    return _calls(value, _ALLOCATE) and all(isinstance(size, tirx.IntImm) for size in value.args[0].values)


def _is_view(value: Any, variables: set[Any]) -> bool:
    """Whether it is one of these, or only says how one is to be read."""
    if isinstance(value, ir.Var):
        return value in variables
    return _calls(value, *_VIEWS) and _are_among(value.args, variables)


def _are_among(arguments: Any, *variables: set[Any]) -> bool:
    """Whether every argument that is a variable is in one of these sets."""
    return all(any(a in those for those in variables) for a in arguments if isinstance(a, ir.Var))


def _operands(region: list[Any]) -> list[Any]:
    return list(dict.fromkeys(a for binding in region for a in binding.value.args if isinstance(a, ir.Var)))


def _builtin(name: str, function: ir.GlobalVar, returned: Any, index: int, *arguments: Any) -> relax.Call:
    """A call of TVM's builtin that keeps what the function returns, or its launches, under an index."""
    given = relax.Tuple([function, *arguments, tirx.IntImm("int64", index)])
    return call_builtin_with_ctx(f"vm.builtin.cuda_graph.{name}", given, ty_args=returned)


def _function(parameters: Any, bindings: list[Any], result: Any, returned: Any) -> relax.Function:
    """With variables of its own."""
    body = relax.SeqExpr([relax.BindingBlock(bindings)], result)
    return copy_with_new_vars(relax.Function(parameters, body, returned, is_pure=False))


def _calls(value: Any, *operators: str) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, ir.Op) and value.op.name in operators
