"""Matrix products on matrix units and without: what gets which, how their tiles are chosen, and what Metal is told."""

from __future__ import annotations

from math import prod

import pytest

tvm = pytest.importorskip("tvm")

from tvm import tirx  # noqa: E402
from tvm.target import Target  # noqa: E402

from attnrewrite.emulator import metal_target  # noqa: E402
from attnrewrite.lowering import build, limits  # noqa: E402
from attnrewrite.lowering.schedules import gpu, gpu_simdgroup, gpu_tiles  # noqa: E402
from attnrewrite.lowering.schedules.gpu_emit import Device  # noqa: E402
from attnrewrite.lowering.schedules.gpu_vectors import runs_in_lanes  # noqa: E402
from attnrewrite.lowering.schedules.stages import Axis  # noqa: E402
from benchmarks.metal_traffic import SWIN_TINY  # noqa: E402
from tests.metal import test_schedules  # noqa: E402

METAL = Device.of(metal_target())
CUDA = Device.of(Target({"kind": "cuda", "arch": "sm_80"}))


def source(rows: int, depth: int, columns: int, dtype: str) -> str:
    """The Metal source of a product of these sizes."""
    shapes = [(1, rows, depth), (depth, columns)]
    fused = build.fuse(test_schedules.relax_module(shapes, tvm.relax.op.matmul, dtype), metal_target())
    scheduled = gpu.schedule(fused, metal_target())
    kernels = {g.name_hint: f for g, f in scheduled.functions.items() if isinstance(f, tirx.PrimFunc)}
    named = tvm.IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()})
    return tvm.tirx.build(named, target=metal_target(), pipeline=limits.PIPELINE).imports[0].inspect_source()


@pytest.mark.parametrize("sizes", [(8, 16, 8), (49, 33, 83)], ids=str)
@pytest.mark.parametrize(("dtype", "operands"), [("float32", "float"), ("float16", "half")])
def test_a_product_is_multiplied_by_matrices(sizes: tuple[int, int, int], dtype: str, operands: str) -> None:
    text = source(*sizes, dtype)
    assert "simdgroup_multiply_accumulate(" in text
    assert f"simdgroup_{operands}8x8" in text
    assert "simdgroup_float8x8" in text  # sums


@pytest.mark.parametrize("sizes", [(7, 64, 64), (64, 15, 64), (64, 64, 7)], ids=str)
def test_what_is_mostly_padding_is_not(sizes: tuple[int, int, int]) -> None:
    assert "simdgroup" not in source(*sizes, "float32")


@pytest.mark.parametrize("name", ["matmul", "matmul-in-vectors", "matmul-transposed-in-vectors"])
def test_single_multiply_adds_keep_the_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_simdgroup, "choose_tile", lambda *_: None)
    test_schedules.compare(name, "float32", test_schedules.FLOAT32)


def operand_bytes(tile: gpu_tiles.Tile, tokens: int, inner: int, outer: int) -> float:
    """Operands read and results written, as a multiple of the least possible."""
    read = inner * (-(-outer // tile.columns) * tokens + -(-tokens // tile.rows) * outer)
    return (read + tokens * outer) / (inner * (tokens + outer) + tokens * outer)


@pytest.mark.parametrize("device", [METAL, CUDA], ids=["metal", "cuda"])
@pytest.mark.parametrize("shape", SWIN_TINY, ids=str)
def test_tiles_read_operands_a_few_times(shape: tuple[int, int, int], device: Device) -> None:
    tokens, inner, outer = shape
    for unit, element_bytes in ((gpu_tiles.SIMDGROUP, 4), (gpu_tiles.SIMDGROUP, 2), (gpu_tiles.TENSOR_CORE, 2)):
        tiles = gpu_tiles.matrix_tiles(unit, device)
        tile = gpu_tiles.choose(tiles, gpu_tiles.Sizes(1, tokens, outer, inner, element_bytes), device)
        assert operand_bytes(tile, *shape) <= gpu_tiles.MOST_TRAFFIC[device.target.kind.name]
        assert prod(tile.launch_size) <= device.limits.threads


def axes(*sizes: int) -> list[Axis]:
    return [Axis(tirx.Var(f"i{n}", "int64"), tirx.IntImm("int64", size)) for n, size in enumerate(sizes)]


RUNS = {
    "one axis": ((8, 12), (12,), lambda i: [i], (4, True), (8, False)),
    "two axes that follow each other": ((8, 6, 6), (6, 6), lambda i, j: [i, j], (4, True), (8, False)),
    "all of a tensor": ((1, 3, 6, 8), (3, 6, 8), lambda i, j, k: [i, j, k], (8, True), (16, True)),
    "every other row": ((8, 12, 6), (6, 6), lambda i, j: [2 * i, j], (2, True), (4, False)),
    "every other element": ((8, 12), (6,), lambda i: [2 * i], (2, False), (4, False)),
    "one element later": ((8, 13), (12,), lambda i: [i + 1], (4, False), (1, True)),
    "in another order": ((8, 6, 6), (6, 6), lambda i, j: [j, i], (4, False), (2, False)),
}


@pytest.mark.parametrize("case", RUNS)
def test_runs_of_neighbours(case: str) -> None:
    shape, sizes, indices, *expected = RUNS[case]
    box = axes(*sizes)
    inner = indices(*(axis.var for axis in box))
    outer = [tirx.Var(f"o{n}", "int64") for n in range(len(shape) - len(inner))]
    buffer = tirx.decl_buffer(shape, "float32")
    for lanes, holds in expected:
        assert runs_in_lanes(buffer, [*outer, *inner], box, lanes) == holds
