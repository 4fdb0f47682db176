"""The operators on tensors: what they compute, their gradients, and what torch asks of an operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from attnrewrite.operators import general  # noqa: E402
from attnrewrite.operators.schema import call  # noqa: E402
from tests.operators.test_schema import CASES, expected, tensors  # noqa: E402
from tests.running import error  # noqa: E402

FLOAT32, BFLOAT16 = 2e-6, 4e-2  # of max |reference|: sums of up to 225 terms, each rounded to 2**-24 or 2**-8

SOME = (
    "shifted-with-mask",
    "padded-with-vectors",
    "halo-with-vectors",
    "extra-queries",
    "relative-per-head",
    "k3",
    "learned",
    "predicted-overlap-add",
)


def compute(spec: Any, operands: dict[str, Any]) -> tuple[Any, ...]:
    overload, args, keywords = call(spec, operands)
    found = overload(*args, **keywords)
    return found if isinstance(found, tuple) else (found,)


def leaves(case: Any, dtype: Any = None) -> dict[str, Any]:
    """The operands as tensors that want gradients."""
    return {n: t.to(dtype or torch.float64).requires_grad_() for n, t in tensors(case).items()}


@pytest.mark.parametrize("name", CASES)
def test_the_operator_computes_what_the_op_means(name: str) -> None:
    case = CASES[name]
    found, wanted = compute(case.spec, tensors(case)), expected(case)
    assert len(found) == len(wanted)
    assert all(error(f.numpy(), w) <= FLOAT32 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_body_computes_what_the_op_means(name: str) -> None:
    case = CASES[name]
    found = general.run(case.spec, tensors(case))
    assert all(error(f.numpy(), w) <= FLOAT32 for f, w in zip(found, expected(case), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_operand(name: str) -> None:
    """Against differences of the operator itself, in float64: all geometries, every operand at once."""
    case = CASES[name]
    operands = leaves(case)

    def function(*given: Any) -> Any:
        return compute(case.spec, dict(zip(operands, given, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(operands.values()), fast_mode=True)


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_those_of_the_body(name: str) -> None:
    """One operand at a time, which asks for other parts of the backward; and only a part of the results is read."""
    case = CASES[name]
    for wanted in case.operands():
        ours, theirs = ({n: t.detach().requires_grad_(n == wanted) for n, t in leaves(case).items()} for _ in range(2))
        found, reference = compute(case.spec, ours)[-1], general.run(case.spec, theirs)[-1]
        weight = torch.from_numpy(np.random.default_rng(1).normal(size=found.shape))
        (grad,) = torch.autograd.grad((found * weight).sum(), [ours[wanted]])
        (same,) = torch.autograd.grad((reference * weight).sum(), [theirs[wanted]])
        torch.testing.assert_close(grad, same, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_the_same_in_every_run(name: str) -> None:
    case = CASES[name]
    runs = []
    for _ in range(2):
        operands = leaves(case, torch.float32)
        sum(r.square().sum() for r in compute(case.spec, operands)).backward()
        runs.append([t.grad for t in operands.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", SOME)
def test_opcheck(name: str) -> None:
    case = CASES[name]
    overload, args, keywords = call(case.spec, leaves(case, torch.float32))
    torch.library.opcheck(overload, args, keywords)


@pytest.mark.parametrize("name", SOME)
def test_autocast_computes_maps_in_its_dtype_and_the_softmax_in_float32(name: str) -> None:
    case = CASES[name]
    operands = leaves(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = compute(case.spec, operands)
    assert all(f.dtype == torch.bfloat16 for f in found)
    sum(f.float().square().sum() for f in found).backward()
    for f, w in zip(found, expected(case), strict=True):
        assert error(f.detach().float().numpy(), w) <= BFLOAT16
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in operands.values())


def test_a_softmax_in_float32_is_exact_where_float16_is_not() -> None:
    """Logits around 2000 step by 1 or 2 in float16; with softmax_dtype the weights are those of float32."""
    case = CASES["shifted-with-mask"]
    operands = {n: t.half() for n, t in tensors(case).items()}
    bias = 2000 + torch.arange(operands["bias"].shape[-1]) * 0.25
    operands |= {"query": operands["query"] * 0, "bias": bias.expand(operands["bias"].shape).contiguous()}
    overload, args, keywords = call(case.spec, operands)
    narrow = overload(*args, **keywords)
    wide = overload(*args, **keywords, softmax_dtype=torch.float32)
    exact = overload(*(a if a is None else a.double() for a in args), **keywords)
    assert error(wide.numpy(), exact.numpy()) < 2e-3
    assert error(narrow.numpy(), exact.numpy()) > 2e-2


@pytest.mark.parametrize("name", ["shifted-with-mask", "extra-queries", "learned", "predicted-logits"])
def test_vmap(name: str) -> None:
    """Over the maps, which is a larger batch, and over another operand, which is not."""
    case = CASES[name]
    operands = tensors(case)
    for mapped in (("query", "value"), ("value", "bias"), tuple(operands)):
        own = {n: torch.stack([t, 2 * t, -t]) for n, t in operands.items() if n in mapped}
        others = {n: t for n, t in operands.items() if n not in own}

        def one(given: dict[str, Any], others: dict[str, Any] = others) -> Any:
            return compute(case.spec, {n: {**given, **others}[n] for n in operands})

        found = torch.vmap(one)(own)
        for k in range(3):
            wanted = one({n: t[k] for n, t in own.items()})
            assert all(torch.allclose(f[k], w, atol=1e-6) for f, w in zip(found, wanted, strict=True))


def test_maps_may_be_parts_of_one_tensor() -> None:
    """Query, key and value as torch.split leaves them, or a transposed map: no copy is needed to be right."""
    case = CASES["shifted-with-mask"]
    operands = tensors(case)
    maps = torch.cat([operands[n] for n in ("query", "key", "value")], -1)
    widths = [operands[n].shape[-1] for n in ("query", "key", "value")]
    whole = compute(case.spec, operands)[0]
    query, key, value = maps.split(widths, -1)
    assert torch.equal(compute(case.spec, {**operands, "query": query, "key": key, "value": value})[0], whole)
    strange = {n: operands[n].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) for n in ("query", "key", "value")}
    assert torch.equal(compute(case.spec, operands | strange)[0], whole)


def test_an_empty_batch() -> None:
    for name in SOME:
        case = CASES[name]
        batched = ("query", "key", "value", "logits", "extra_query", "extra_key", "extra_value")
        operands = {n: t[:0] if n in batched else t for n, t in leaves(case).items()}
        found = compute(case.spec, operands)
        assert all(f.shape[0] == 0 for f in found)
        sum(f.sum() for f in found).backward()
