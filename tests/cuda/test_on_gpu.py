"""On a GPU: the operators, their streams and graphs, and a compiled model. Skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

import attnrewrite  # noqa: E402
from attnrewrite.functions.spec import FlashWindowAttention  # noqa: E402
from attnrewrite.operators import compiled, general  # noqa: E402
from attnrewrite.operators.kernel import MAPS  # noqa: E402
from attnrewrite.operators.schema import call  # noqa: E402
from examples.models.swin import Swin  # noqa: E402
from tests.models.build import CACHE_VARIABLE  # noqa: E402
from tests.operators.test_schema import CASES, tensors  # noqa: E402
from tests.running import error  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device here", allow_module_level=True)

pytestmark = pytest.mark.gpu

# Of the largest result: sums in another order; maps and weights of the softmax rounded to halves.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ADDED_TO_LOGITS = ("bias", "mask", "logit_bias")


@pytest.fixture(autouse=True, scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No kernels but those of this file, kept between runs where the tests' cache is."""
    kept = os.environ.get(CACHE_VARIABLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNREWRITE_CACHE", kept or str(tmp_path_factory.mktemp("kernels")))
        patch.setattr(compiled, "_state", compiled._State())
        compiled.use_kernels(True)
        compiled.prepare((CASES[n].spec, on_gpu(n, dtype)) for n in NAMES for dtype in DTYPES)
        yield


NAMES = [name for name, case in CASES.items() if case.spec.softmax_dtype in (0, 1)]
DTYPES = [dtype for dtype in TOLERANCES if dtype != torch.bfloat16]
if torch.cuda.get_device_capability() >= (8, 0):
    DTYPES.append(torch.bfloat16)


def on_gpu(name: str, dtype: Any) -> dict[str, Any]:
    """The operands of a case; what is added to its logits stays float32."""
    return {n: t.cuda() if n in ADDED_TO_LOGITS else t.to("cuda", dtype) for n, t in tensors(CASES[name]).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_computes_what_the_op_means(name: str, dtype: Any) -> None:
    operands = on_gpu(name, dtype)
    before = compiled.launched_kernels()
    found = compiled.results_of(CASES[name].spec, operands)
    assert found is not None
    assert compiled.launched_kernels() == before + 1
    exact = general.run(CASES[name].spec, {n: t.double().cpu() for n, t in operands.items()})
    for result, expected in zip(found, exact, strict=True):
        assert error(result.double().cpu().numpy(), expected.numpy()) <= TOLERANCES[dtype]


@pytest.mark.parametrize("name", ["shifted-with-mask", "k3"])
def test_parts_of_one_map_are_read_where_they_lie(name: str) -> None:
    spec, operands = CASES[name].spec, on_gpu(name, torch.float16)
    axis = -1 if isinstance(spec, FlashWindowAttention) else 1
    maps = {n: operands[n] for n in MAPS}
    parts = torch.cat([*maps.values()], axis).split([t.shape[axis] for t in maps.values()], axis)
    found = compiled.results_of(spec, operands | dict(zip(maps, parts, strict=True)))
    expected = compiled.results_of(spec, operands)
    assert found is not None and expected is not None
    assert torch.equal(found[0], expected[0])


def operator(name: str) -> tuple[Any, Any]:
    """A call without arguments, and the query that it reads."""
    operands = on_gpu(name, torch.float16)
    overload, args, keywords = call(CASES[name].spec, operands)
    return lambda: overload(*args, **keywords), operands["query"]


@pytest.mark.parametrize("name", ["shifted-with-mask", "k3"])
def test_a_captured_call_is_replayed_on_what_its_operands_hold_then(name: str) -> None:
    run, query = operator(name)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    query.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, run())


def test_a_call_waits_for_its_stream_alone() -> None:
    run, query = operator("shifted-with-mask")
    expected = run()
    held = query.clone()
    query.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        query.copy_(held)  # late on this stream: a launch on another would read zeros
        found = run()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_call_on_another_device_leaves_the_current_one() -> None:
    spec, operands = CASES["shifted-with-mask"].spec, on_gpu("shifted-with-mask", torch.float16)
    expected = compiled.results_of(spec, operands)
    found = compiled.results_of(spec, {n: t.to("cuda:1") for n, t in operands.items()})
    assert torch.cuda.current_device() == 0
    assert expected is not None
    assert found is not None
    assert torch.equal(found[0].cpu(), expected[0].cpu())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_compiled_model_gives_the_same_with_graphs_and_without(tmp_path: Path, precision: str) -> None:
    major, minor = torch.cuda.get_device_capability()
    model = Swin((64, 96), dim=24, depths=(2, 2), num_heads=(3, 6), num_classes=10).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        target = f"cuda:sm_{major}{minor}"
        result = attnrewrite.optimize(model, (x,), target, precision=precision)  # verified on the GPU
        result.save(tmp_path / "swin")
        expected = model(x).numpy()
    loaded = [attnrewrite.load(tmp_path / "swin", cuda_graph=flag) for flag in (True, False)]
    assert loaded[0].manifest.replayed_entry is not None
    name = loaded[0].inputs[0].name
    for scale in (1.0, -2.0, 1.0):
        replayed, launched = (next(iter(m.run({name: (scale * x).numpy()}).values())) for m in loaded)
        np.testing.assert_array_equal(replayed, launched)
    assert error(replayed, expected) <= (1e-5 if precision == "fp32" else 2e-2)
