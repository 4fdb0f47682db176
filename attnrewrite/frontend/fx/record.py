"""Which ATen operators a torch.fx graph calls: the graph is run on fake tensors and every call is heard.

A call is heard whole where the table has an entry for it, also where torch would take it apart (`linear`, `softmax`,
`scaled_dot_product_attention`): in inference mode such composite operators reach a dispatch mode before they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnrewrite.frontend.fx.autocast import DEVICES
from attnrewrite.frontend.fx.calls import bound

# Operators that take a submodule and run it as it is, in a state that the calls inside show.
_RUNS_ITS_SUBMODULE = {
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
    "tag_activation_checkpoint": 0,
    "wrap": 0,
}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every call to `hear(target, arguments by name)`, whose answer is the call's result.

    whole: whether an operator that torch can take apart is heard as it is.
    """

    def __init__(self, whole: Callable[[OpOverload], bool], hear: Callable[[OpOverload, dict[str, Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._whole = whole
        self._hear = hear

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or func.namespace == "prim":
            return func(*args, **kwargs)
        if not self._whole(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._hear(func, bound(func, args, kwargs))


class Runner(torch.fx.Interpreter):
    """Runs a graph node by node under a recorder. before(node, its arguments) and after(node, result) are called around
    each, attribute(name, what it is) for what a get_attr node returns.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        recorder: Recorder,
        before: Callable[[torch.fx.Node, Callable[[torch.fx.Node], Any]], None],
        after: Callable[[torch.fx.Node, Any], Any],
        attribute: Callable[[torch.fx.Node, Any], Any],
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self._recorder = recorder
        self._before, self._after, self._attribute = before, after, attribute

    def run_node(self, n: torch.fx.Node) -> Any:
        self._before(n, lambda argument: self.env[argument])
        with self._recorder:
            result = super().run_node(n)
        return self._after(n, result)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._attribute(target, super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Runs the submodules of the operators that only set a state around them."""
        at = _RUNS_ITS_SUBMODULE.get(getattr(target, "__name__", ""))
        if at is None or not isinstance(target, torch._ops.HigherOrderOperator):
            return super().call_function(target, args, kwargs)
        with _state_of(target.__name__, args[:at]):
            return torch.fx.Interpreter(args[at]).run(*args[at + 1 :])


@contextlib.contextmanager
def _state_of(operator: str, settings: tuple[Any, ...]) -> Iterator[None]:
    if operator == "wrap_with_autocast":
        device, dtype, enabled, cache = settings
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
            yield
    else:
        yield


@contextlib.contextmanager
def quiet(mode: FakeTensorMode) -> Iterator[None]:
    """The state in which a graph is run: calls arrive whole, nothing is learned of symbols, nothing outlives it."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    grad = torch.is_grad_enabled()
    autocast = {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        shape_env = mode.shape_env
        if shape_env is not None:
            stack.enter_context(shape_env.suppress_guards())
            stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(mode)
        stack.enter_context(enable_python_dispatcher())  # whose shape rules know symbols
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_grad_enabled(grad)
            for device, (enabled, dtype) in autocast.items():
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)


def is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def is_autocast(target: OpOverload) -> bool:
    """Whether a call is one by which autocast converts an operand, or may be."""
    is_cast = target in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
    return is_cast and any(torch.is_autocast_enabled(device) for device in DEVICES)
