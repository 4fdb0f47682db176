"""What benchmarks/gpu.py measures: rows, and for each the contestants that compute it.

Letters: B batch, H/W feature-map height/width, C channels, N tokens per window, nW windows, nH heads, d head_dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec
from attnrewrite.localattention.geometry import NeighborhoodGeometry, WindowGeometry
from attnrewrite.operators.schema import call
from benchmarks.gpu_clock import Run
from examples.models.swin import shift_mask, window_merge, window_partition

LEVELS = ("op", "map", "neighbourhood", "model")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of the largest result: the products' own rounding, that of what lies between them, and of the result.
TOLERANCES = {"fp32": 2e-5, "fp16": 1e-2, "bf16": 6e-2}
# A whole model rounds between all of its operators.
MODEL_TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2}

OWN = "attnrewrite"
# Sites from which on the exact result is computed of the first images only.
EXACT_IMAGES = 64

Tensors = dict[str, torch.Tensor]


class Missing(Exception):
    """A contestant that cannot take part, and why."""


@dataclass(frozen=True)
class Row:
    """moved: the least bytes; flops: the operations of the products. Both 0 for models.

    contestants: what makes each of them ready, on a device; it raises Missing where it cannot take part, and gives a
    call without arguments. exact: the result in float64, at least of its first images.
    """

    level: str
    name: str
    dtype: str
    moved: int
    flops: float
    contestants: Mapping[str, Callable[[], Run]]
    exact: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Site:
    """One op on operands of these shapes, made from a seed. `sample`: only their shapes and dtypes matter."""

    level: str
    name: str
    dtype: str
    spec: Spec
    shapes: Mapping[str, tuple[int, ...]]

    def operands(self, device: str) -> Tensors:
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[self.dtype]
        return {n: torch.randn(s, generator=generator, device=device).to(dtype) for n, s in self.shapes.items()}

    def sample(self) -> Tensors:
        return {n: torch.empty(s, dtype=DTYPES[self.dtype], device="meta") for n, s in self.shapes.items()}


# -- op level ---------------------------------------------------------------------------------------------------------

HEADS = 4


def op_sites(dry: bool) -> Iterator[Site]:
    """Windows that are whole maps: no roll, no partition."""
    for side in (4,) if dry else (4, 7, 8):
        for head_dim in (16,) if dry else (16, 32, 64):
            for windows in (2,) if dry else (64, 256, 1024, 4096):
                for dtype in DTYPES:
                    geometry = WindowGeometry((side, side), (side, side), (0, 0))
                    spec = FlashWindowAttention(geometry, HEADS, head_dim**-0.5)
                    shape, tokens = (windows, side, side, HEADS * head_dim), side * side
                    shapes = {"query": shape, "key": shape, "value": shape, "bias": (1, HEADS, tokens, tokens)}
                    yield Site("op", f"{windows} windows of {tokens}, head_dim {head_dim}", dtype, spec, shapes)


def op_row(site: Site, device: str) -> Row:
    tokens, heads = site.shapes["bias"][-1], HEADS

    def given() -> tuple[torch.Tensor, ...]:
        """[nW, nH, N, d] each, and the bias: what the peers take, as they like it best."""
        own = site.operands(device)
        maps = [
            own[n].flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
            for n in ("query", "key", "value")
        ]
        return (*maps, own["bias"])

    def naive(query: Any, key: Any, value: Any, bias: Any) -> torch.Tensor:
        logits = query @ key.transpose(-2, -1) * site.spec.scale + bias
        return logits.softmax(-1) @ value

    def merged(run: Callable[..., torch.Tensor]) -> Callable[[], Run]:
        """With results as the op gives them, which is a view."""

        def make() -> Run:
            operands = given()
            return lambda: run(*operands).transpose(1, 2).flatten(2)

        return make

    def sdpa(query: Any, key: Any, value: Any, bias: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, bias, scale=site.spec.scale)

    def flex() -> Run:
        operands = given()
        attend = _flex_attention()
        bias = operands[-1][0]

        def add_bias(score: Any, window: Any, head: Any, query: Any, key: Any) -> Any:
            return score + bias[head, query, key]

        maps = operands[:3]
        return lambda: attend(*maps, score_mod=add_bias, scale=site.spec.scale).transpose(1, 2).flatten(2)

    contestants = {
        "naive": merged(naive),
        "sdpa": merged(sdpa),
        "flex": flex,
        "torch.compile": merged(_compiled(naive, device)),
        OWN: lambda: _flat(_own(site, device), tokens),
    }
    flops = 4.0 * site.shapes["query"][0] * tokens * tokens * site.shapes["query"][-1]
    return _row(site, device, contestants, flops, lambda t: t.flatten(1, 2))


def _flat(run: Run, tokens: int) -> Run:
    return lambda: run().flatten(1, 2)


# -- feature-map level ------------------------------------------------------------------------------------------------

STAGES = ((56, 96, 3), (28, 192, 6), (14, 384, 12), (7, 768, 24))
WINDOW = 7


def map_sites(dry: bool) -> Iterator[Site]:
    """The four stages of Swin-T, with and without shift."""
    for size, channels, heads in ((14, 24, 3),) if dry else STAGES:
        for shift in (0, 3) if size > WINDOW else (0,):
            for batch in (1,) if dry else (1, 32, 256):
                for dtype in ("fp32", "fp16"):
                    geometry = WindowGeometry((size, size), (WINDOW, WINDOW), (shift, shift))
                    mask_value = -100.0 if shift else None
                    spec = FlashWindowAttention(geometry, heads, (channels // heads) ** -0.5, mask_value)
                    shape, tokens = (batch, size, size, channels), WINDOW * WINDOW
                    shapes = {"query": shape, "key": shape, "value": shape, "bias": (1, heads, tokens, tokens)}
                    yield Site("map", f"{size}x{size}x{channels}, shift {shift}, batch {batch}", dtype, spec, shapes)


def map_row(site: Site, device: str) -> Row:
    spec = site.spec
    assert isinstance(spec, FlashWindowAttention)
    size, shift = spec.geometry.feature_size, spec.geometry.shift_size
    sides = (WINDOW, WINDOW)
    tokens, heads = WINDOW * WINDOW, spec.num_heads

    def chain(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def whole(query: Any, key: Any, value: Any, added: Any) -> torch.Tensor:
            parts = []
            for x in (query, key, value):
                x = torch.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x
                parts.append(window_partition(x, sides).unflatten(-1, (heads, -1)).transpose(1, 2))
            result = window_merge(attend(*parts, added).transpose(1, 2).flatten(2), sides, size)
            return torch.roll(result, shift, (1, 2)) if any(shift) else result

        return whole

    def naive(query: Any, key: Any, value: Any, added: Any) -> torch.Tensor:
        logits = (query * spec.scale) @ key.transpose(-2, -1)
        logits = (logits.unflatten(0, (-1, len(added))) + added).flatten(0, 1)
        return logits.softmax(-1) @ value

    def sdpa(query: Any, key: Any, value: Any, added: Any) -> torch.Tensor:
        whole = added.repeat(len(query) // len(added), 1, 1, 1)
        return F.scaled_dot_product_attention(query, key, value, whole, scale=spec.scale)

    def given() -> tuple[torch.Tensor, ...]:
        own = site.operands(device)
        added = own["bias"]
        if any(shift):
            added = added + shift_mask(size, sides, shift)[:, None].to(added)
        return own["query"], own["key"], own["value"], added

    def ready(run: Callable[..., torch.Tensor]) -> Callable[[], Run]:
        def make() -> Run:
            operands = given()
            return lambda: run(*operands)

        return make

    contestants = {
        "chain": ready(chain(naive)),
        "chain of sdpa": ready(chain(sdpa)),
        "torch.compile": ready(_compiled(chain(naive), device)),
        OWN: lambda: _own(site, device),
    }
    flops = 4.0 * site.shapes["query"][0] * size[0] * size[1] * tokens * site.shapes["query"][-1]
    return _row(site, device, contestants, flops)


# -- neighbourhoods ---------------------------------------------------------------------------------------------------


def neighbourhood_sites(dry: bool) -> Iterator[Site]:
    size, channels, heads = (8, 12, 3) if dry else (56, 96, 3)
    for k in (3,) if dry else (3, 5, 7, 9, 11, 13):
        for batch in (1,) if dry else (1, 32):
            for dtype in ("fp32", "fp16"):
                geometry = NeighborhoodGeometry((size, size), (k, k), (1, 1))
                shape = (batch, channels, size, size)
                shapes = {"query": shape, "key": shape, "value": shape, "bias": (heads, k * k)}
                spec = SlideAttention(geometry, heads, (channels // heads) ** -0.5)
                yield Site("neighbourhood", f"k {k}, {size}x{size}x{channels}, batch {batch}", dtype, spec, shapes)


def neighbourhood_row(site: Site, device: str) -> Row:
    spec = site.spec
    assert isinstance(spec, SlideAttention)
    k, heads = spec.geometry.kernel_size[0], spec.num_heads
    batch, channels, *size = site.shapes["query"]

    def unfold(query: Any, key: Any, value: Any, bias: Any) -> torch.Tensor:
        def neighbours(x: torch.Tensor) -> torch.Tensor:
            return F.unfold(x, k, padding=k // 2).view(batch, heads, channels // heads, k * k, -1)

        own = query.view(batch, heads, channels // heads, 1, -1)
        logits = (own * neighbours(key)).sum(2) * spec.scale + bias[None, :, :, None]
        return (logits.softmax(2)[:, :, None] * neighbours(value)).sum(3).reshape(query.shape)

    def ready(run: Callable[..., torch.Tensor]) -> Callable[[], Run]:
        def make() -> Run:
            operands = tuple(site.operands(device).values())
            return lambda: run(*operands)

        return make

    def natten() -> Run:
        """Without the bias, which its present functions do not take, and with borders of its own."""
        attend = _imported("natten").na2d
        query, key, value, _ = site.operands(device).values()
        maps = [x.view(batch, heads, -1, *size).permute(0, 3, 4, 1, 2).contiguous() for x in (query, key, value)]
        return lambda: attend(*maps, kernel_size=k, scale=spec.scale)

    contestants = {
        "unfold": ready(unfold),
        "torch.compile": ready(_compiled(unfold, device)),
        "natten": natten,
        OWN: lambda: _own(site, device),
    }
    flops = 4.0 * batch * channels * size[0] * size[1] * k * k
    return _row(site, device, contestants, flops)


# Contestants whose results are not compared: they compute something else of the same size.
NOT_COMPARED = frozenset({"natten"})

# -- models -----------------------------------------------------------------------------------------------------------

MODELS = ("swin_tiny", "swin_base", "swin_large", "slide_swin_tiny", "swinir_light_64")
DRY_MODELS = ("unfold_k3_8",)


@dataclass(frozen=True)
class ModelSite:
    """A model of the zoo at a batch size. level: `model`."""

    name: str
    batch: int
    dtype: str

    level = "model"

    @property
    def label(self) -> str:
        return f"{self.name}, batch {self.batch}"

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.batch}-{self.dtype}"

    def module(self) -> torch.nn.Module:
        """In float32, on the CPU. A tensor has four different numbers at most, so that files of them compress well."""
        try:
            module = _zoo(self.name).module()
        except ImportError as error:
            raise Missing(str(error)) from None
        numbers = np.random.default_rng(0)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.numel() > 1 and parameter.std() > 0:
                    drawn = numbers.integers(0, 4, tuple(parameter.shape)) - 1.5
                    step = 2.0 ** np.round(np.log2(float(parameter.std())))  # float16 has these numbers, too
                    parameter.copy_(torch.from_numpy(drawn * step))
        return module

    def shape(self) -> tuple[int, ...]:
        return (self.batch, *_zoo(self.name).shapes[0][1:])

    def images(self, device: str) -> torch.Tensor:
        return torch.randn(self.shape(), generator=torch.Generator().manual_seed(1)).to(device, DTYPES[self.dtype])


def _zoo(name: str) -> Any:
    from benchmarks import zoo

    return zoo.model(name)


def model_sites(dry: bool) -> Iterator[ModelSite]:
    for name in DRY_MODELS if dry else MODELS:
        for batch in (1,) if dry else (1, 32, 128):
            for dtype in ("fp32",) if dry else ("fp32", "fp16"):
                yield ModelSite(name, batch, dtype)


def model_row(site: ModelSite, device: str, artifacts: Path | None) -> Row:
    def in_torch(prepare: Callable[[torch.nn.Module], Callable[..., Any]]) -> Callable[[], Run]:
        def make() -> Run:
            module = prepare(site.module().to(device, DTYPES[site.dtype]))
            x = site.images(device)
            return lambda: _first(module(x))

        return make

    def rewritten(module: torch.nn.Module) -> Callable[..., Any]:
        if device == "cpu":
            import attnrewrite.dynamo

            return torch.compile(module, backend=attnrewrite.dynamo.rewriting(lambda graph, _: graph))
        return torch.compile(module, backend="attnrewrite")

    def artifact() -> Run:
        if artifacts is None or not (artifacts / site.folder).is_dir():
            raise Missing("not compiled")
        return _of_artifact(artifacts / site.folder, site.images(device), device)

    contestants = {
        "eager": in_torch(lambda module: module),
        "torch.compile": in_torch(lambda module: _compiled(module, device)),
        OWN: in_torch(rewritten),
        f"{OWN}, compiled by TVM": artifact,
    }

    def exact() -> torch.Tensor:
        """In float32: float64 would take minutes."""
        return _first(site.module().to(device)(site.images(device).float()))

    return Row("model", site.label, site.dtype, 0, 0.0, contestants, exact)


def _of_artifact(folder: Path, images: torch.Tensor, device: str) -> Run:
    from attnrewrite.runtime import LoadedModel

    model = LoadedModel(folder)
    wanted = model.inputs[0].dtype
    x = images.to(getattr(torch, wanted))
    return lambda: torch.from_dlpack(model.run_on_device(x)[0])


def _first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else next(iter(result))


# -- what rows share --------------------------------------------------------------------------------------------------


def _own(site: Site, device: str) -> Run:
    overload, args, keywords = call(site.spec, site.operands(device))
    return lambda: overload(*args, **keywords)


def _compiled(run: Any, device: str) -> Any:
    """By Inductor; in a dry run by a backend that compiles nothing."""
    return torch.compile(run, dynamic=False, **({"backend": "eager"} if device == "cpu" else {}))


def _row(
    site: Site,
    device: str,
    contestants: Mapping[str, Callable[[], Run]],
    flops: float,
    shaped: Callable[[torch.Tensor], torch.Tensor] = lambda result: result,
) -> Row:
    elements = sum(int(np.prod(shape)) for shape in site.shapes.values()) + int(np.prod(site.shapes["value"]))

    def exact() -> torch.Tensor:
        from attnrewrite.operators import slide, window

        maps = ("query", "key", "value")
        operands = {n: (t[:EXACT_IMAGES] if n in maps else t).double() for n, t in site.operands(device).items()}
        forward = window.forward if isinstance(site.spec, FlashWindowAttention) else slide.forward
        return shaped(forward(site.spec, operands)[0])

    moved = elements * DTYPES[site.dtype].itemsize
    return Row(site.level, site.name, site.dtype, moved, flops, contestants, exact)


@cache
def _flex_attention() -> Any:
    module = _imported("torch.nn.attention.flex_attention")
    return torch.compile(module.flex_attention, dynamic=False) if torch.cuda.is_available() else module.flex_attention


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(str(error)) from None


def sites_of(level: str, dry: bool) -> list[Any]:
    """Every site of a level, in the order of the table."""
    makers: dict[str, Callable[[bool], Iterator[Any]]] = {
        "op": op_sites,
        "map": map_sites,
        "neighbourhood": neighbourhood_sites,
        "model": model_sites,
    }
    return list(makers[level](dry))


def row_of(site: Any, device: str, artifacts: Path | None) -> Row:
    """artifacts: the folder of compiled models, if any."""
    if isinstance(site, ModelSite):
        return model_row(site, device, artifacts)
    return {"op": op_row, "map": map_row, "neighbourhood": neighbourhood_row}[site.level](site, device)
