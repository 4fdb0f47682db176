"""`torch.ops.attnrewrite.linear`: a linear layer that is only run, on the faster of PyTorch's two libraries for CPUs.

PyTorch computes float32 linear layers with the BLAS it was built with, which on CPUs of other makers than the BLAS's
own may reach half of what oneDNN does (88 against 203 GFLOP/s of MKL and oneDNN on one core of a Zen 5). Which is
faster here is measured once, on one small product. With gradients, autocast, other dtypes or devices, and where a
graph is traced, this is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from attnrewrite.operators.schema import LIBRARY

# Below this many rows a product is a walk over the weights, and what counts is the overhead of a call.
MINIMUM_ROWS = 16
_SIDE, _RUNS = 256, 5


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [..., C], weight [D, C], bias [D] -> [..., D]."""
    if _is_plain(input, weight) and input.numel() >= MINIMUM_ROWS * weight.shape[1] and onednn_is_faster():
        return _onednn(input, weight, bias)
    return functional.linear(input, weight, bias)


def _is_plain(input: Tensor, weight: Tensor) -> bool:
    """Whether this is float32 arithmetic on a CPU and nothing else looks on."""
    return (
        type(input) is Tensor
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
        and input.is_contiguous()
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._functorch.is_functorch_wrapped_tensor(input)
        and torch.autograd.forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Measured on this machine, once: the median of a few small products each, in turns."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x, weight = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    contestants: tuple[Callable[..., Tensor], ...] = (functional.linear, _onednn)
    taken: list[list[float]] = [[], []]
    try:
        with torch.inference_mode():
            for _ in range(_RUNS):
                for run, seconds in zip(contestants, taken, strict=True):
                    run(x, weight, None)
                    start = time.perf_counter()
                    run(x, weight, None)
                    seconds.append(time.perf_counter() - start)
    except (AttributeError, RuntimeError):  # a PyTorch built without oneDNN
        return False
    own, other = map(statistics.median, taken)
    return other < own


def _onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return result


LIBRARY.define("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")  # type: ignore[no-untyped-call]
LIBRARY.impl("linear", linear, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
