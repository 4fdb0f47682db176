"""What the operators do on each kind of tensor: compute, differentiate, autocast, batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnrewrite.functions.spec import DOMAIN, FlashWindowAttention, Spec
from attnrewrite.operators import compiled, slide, window
from attnrewrite.operators.schema import LIBRARY, OPERATORS, Operator, bind, call, number_of

# In autocast these keep their precision: they are added to logits in the softmax's dtype.
_ADDED_TO_LOGITS = ("bias", "mask", "logit_bias")
# Operands whose first axis is the batch.
_BATCHED = ("query", "key", "value", "logits")


def results_of(spec: Spec, operands: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The op, by a compiled kernel where there is one."""
    if operands["value"].device.type in ("cpu", "cuda") and (found := compiled.results_of(spec, operands)) is not None:
        return found
    if isinstance(spec, FlashWindowAttention):
        return window.forward(spec, operands)
    return slide.forward(spec, operands)


def gradients_of(
    spec: Spec, operands: Mapping[str, Tensor], grads: Sequence[Tensor | None], wanted: Sequence[str]
) -> list[Tensor]:
    """Gradients of the operands named `wanted`, in their order."""
    if isinstance(spec, FlashWindowAttention):
        return window.backward(spec, operands, grads, wanted)
    return slide.backward(spec, operands, grads, wanted)


def _register(operator: Operator) -> None:
    """Everything of one operator, and its backward as an operator of its own: compilers see one node, not its loops."""
    grads = ", ".join(f"Tensor grad_{k}" for k in range(operator.results))
    name = f"{operator.name}_backward"
    LIBRARY.define(f"{name}({grads}, {operator.arguments}, bool[] wanted) -> Tensor[]", tags=_TAGS)  # type: ignore[no-untyped-call]

    def compute(*args: Any, **keywords: Any) -> Any:
        spec, operands = bind(operator, args, keywords)
        results = results_of(spec, operands)
        return results[0] if operator.results == 1 else results

    def differentiate(*args: Any, **keywords: Any) -> list[Tensor]:
        grads, rest, wanted = _backward_call(args, keywords)
        spec, operands = bind(operator, *rest)
        return gradients_of(spec, operands, grads, wanted)

    def shapes_of_gradients(*args: Any, **keywords: Any) -> list[Tensor]:
        _, rest, wanted = _backward_call(args, keywords)
        _, operands = bind(operator, *rest)
        return [operands[n].new_empty(operands[n].shape) for n in wanted]

    def _backward_call(
        args: Sequence[Any], keywords: Mapping[str, Any]
    ) -> tuple[Sequence[Tensor], tuple[Sequence[Any], dict[str, Any]], list[str]]:
        rest = dict(keywords)
        flags = rest.pop("wanted")
        wanted = [n for n, flag in zip(operator.operands, flags, strict=False) if flag]
        return args[: operator.results], (args[operator.results :], rest), wanted

    def save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.keywords = keyword_only_inputs
        ctx.shapes = [(o.shape, o.dtype, o.device) for o in (output if isinstance(output, tuple) else (output,))]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operands, wanted = ctx.saved_tensors, list(ctx.needs_input_grad)
        arrived = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.shapes, strict=True)
        ]
        overload = getattr(torch.ops.attnrewrite, name).default
        found = iter(overload(*arrived, *operands, **ctx.keywords, wanted=wanted))
        return tuple(next(found) if flag else None for flag in wanted)

    LIBRARY.impl(operator.name, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, differentiate, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{DOMAIN}::{name}", shapes_of_gradients, lib=LIBRARY)
    torch.library.register_autograd(f"{DOMAIN}::{operator.name}", backward, setup_context=save, lib=LIBRARY)
    for device in ("cpu", "cuda"):
        LIBRARY.impl(operator.name, _autocast(operator, device), f"Autocast{device.upper()}")  # type: ignore[no-untyped-call]
    torch.library.register_vmap(f"{DOMAIN}::{operator.name}", _batched(operator), lib=LIBRARY)


_TAGS = (torch.Tag.pt2_compliant_tag,)


def _autocast(operator: Operator, device: str) -> Any:
    """Feature maps in autocast's dtype, the softmax and what is added to its logits in float32."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(*args: Any, **keywords: Any) -> Any:
        spec, operands = bind(operator, args, keywords)
        lower = torch.get_autocast_dtype(device)
        if all(t.dtype != torch.float64 for t in operands.values()):
            operands = {n: t if n in _ADDED_TO_LOGITS else t.to(lower) for n, t in operands.items()}
            if not spec.softmax_dtype:
                spec = replace(spec, softmax_dtype=number_of(torch.float32))
        overload, given, attributes = call(spec, operands)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return overload(*given, **attributes)

    return cast


def _batched(operator: Operator) -> Any:
    """vmap: the mapped axis becomes part of the batch where it may, otherwise one call after the other."""

    def batched(info: Any, in_dims: tuple[Any, ...], *args: Any, **keywords: Any) -> Any:
        mapped = {n for n, axis in zip(operator.operands, in_dims, strict=False) if axis is not None}
        front = [t if axis is None else t.movedim(axis, 0) for t, axis in zip(args, in_dims, strict=False)]
        overload, count = operator.overload, info.batch_size
        maps = set(_BATCHED).intersection(operator.operands)
        shared = {"logit_bias", "extra_query", "extra_key", "extra_value"}
        alone = all(n not in shared for n, t in zip(operator.operands, args, strict=False) if t is not None)
        if mapped <= maps and alone:
            folded = [
                t if n not in maps else (t if n in mapped else t.expand(count, *t.shape)).flatten(0, 1)
                for n, t in zip(operator.operands, front, strict=False)
            ]
            results = overload(*folded, **keywords)
            results = results if isinstance(results, tuple) else (results,)
            apart = tuple(r.unflatten(0, (count, -1)) for r in results)
        else:
            each = [
                overload(
                    *(t[k] if n in mapped else t for n, t in zip(operator.operands, front, strict=False)), **keywords
                )
                for k in range(count)
            ]
            each = [r if isinstance(r, tuple) else (r,) for r in each]
            apart = tuple(torch.stack(of) for of in zip(*each, strict=True))
        return (apart[0], 0) if operator.results == 1 else (apart, (0,) * len(apart))

    return batched


for _operator in OPERATORS.values():
    _register(_operator)
