"""The same PyTorch blocks as ONNX and as torch.fx fold alike, and compute the same in float64."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from attnrewrite.frontend.fx.read import read as read_program
from attnrewrite.frontend.fx.write import write
from attnrewrite.frontend.onnx import read
from attnrewrite.graph import Graph
from attnrewrite.pipeline import Outcome, select

CHANNELS, SIZE = 6, (7, 11)


def conv_bn(read: int, written: int, size: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(read, written, size, bias=False, **{"padding": "same"} | options), nn.BatchNorm2d(written)
    )


class Branches(nn.Module):
    """The sum of what some modules make of the input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class BorderedNorm(nn.Module):
    """A BatchNorm, and around what it gives, what it would give for zeros (DBB)."""

    def __init__(self, channels: int, amount: int, *, of_zeros: bool = True) -> None:
        super().__init__()
        self.norm, self.amount, self.of_zeros = nn.BatchNorm2d(channels), amount, of_zeros

    def forward(self, x: Tensor) -> Tensor:
        norm, k = self.norm, self.amount
        y = functional.pad(norm(x), [k] * 4)
        border = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
        border = (border if self.of_zeros else norm.bias).view(1, -1, 1, 1)
        y[:, :, :k, :] = border
        y[:, :, -k:, :] = border
        y[:, :, :, :k] = border
        y[:, :, :, -k:] = border
        return y


def diverse(of_zeros: bool = True) -> nn.Module:
    """A diverse branch block: k x k, 1 x 1, 1 x 1 then k x k, 1 x 1 then a mean."""
    border = partial(BorderedNorm, amount=1, of_zeros=of_zeros)
    return Branches(
        conv_bn(CHANNELS, 8, 3),
        conv_bn(CHANNELS, 8, 1),
        nn.Sequential(nn.Conv2d(CHANNELS, 4, 1, bias=False), border(4), *conv_bn(4, 8, 3, padding=0)),
        nn.Sequential(nn.Conv2d(CHANNELS, 8, 1, bias=False), border(8), nn.AvgPool2d(3, 1), nn.BatchNorm2d(8)),
    )


class Crop(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.cut = (..., *(slice(k, -k if k else None) for k in (rows, columns)))

    def forward(self, x: Tensor) -> Tensor:
        return x[self.cut]


class LayerScale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MixedOnMap(nn.Module):
    """x + gamma * (mixer(x) - norm(x)), as FastViT writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.BatchNorm2d(CHANNELS), conv_bn(CHANNELS, CHANNELS, 3, groups=CHANNELS)
        self.scale = LayerScale(CHANNELS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.mixer(x) - self.norm(x))


class Partly(nn.Module):
    """Two branches, and the input once more behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = Branches(conv_bn(CHANNELS, CHANNELS, 3), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x) + self.branches(x)


@dataclass(frozen=True)
class Block:
    """rows: (branches, operator or verdict) of the report. left: operators of the folded graph."""

    build: Any
    rows: Sequence[tuple[int, str]]
    left: Sequence[str] | None = None
    shape: tuple[int, ...] = (2, CHANNELS, *SIZE)


depthwise = partial(conv_bn, CHANNELS, CHANNELS, groups=CHANNELS)
BLOCKS: dict[str, Block] = {
    "repvgg": Block(lambda: Branches(conv_bn(6, 6, 3), conv_bn(6, 6, 1), nn.BatchNorm2d(6)), [(3, "Conv")], ["Conv"]),
    "strided": Block(
        lambda: Branches(conv_bn(6, 8, 3, stride=2, padding=1), conv_bn(6, 8, 1, stride=2, padding=0)),
        [(2, "Conv")],
        ["Conv"],
    ),
    "large-and-small-kernel": Block(lambda: Branches(depthwise(13), depthwise(5)), [(2, "Conv")], ["Conv"]),
    "dilated-reparam": Block(
        lambda: Branches(depthwise(9), depthwise(5, padding=4, dilation=2), depthwise(3, padding=3, dilation=3)),
        [(3, "Conv")],
        ["Conv"],
    ),
    "acnet": Block(
        lambda: Branches(
            conv_bn(6, 8, 3), conv_bn(6, 8, (3, 1), padding=(1, 0)), conv_bn(6, 8, (1, 3), padding=(0, 1))
        ),
        [(3, "Conv")],
        ["Conv"],
    ),
    "acnet-cropped": Block(
        lambda: Branches(
            conv_bn(6, 8, 3, padding=0),
            nn.Sequential(Crop(0, 1), *conv_bn(6, 8, (3, 1), padding=0)),
            nn.Sequential(Crop(1, 0), *conv_bn(6, 8, (1, 3), padding=0)),
        ),
        [(3, "Conv")],
        ["Conv"],
    ),
    "diverse": Block(diverse, [(4, "Conv")], ["Conv"]),
    "mixer-with-layer-scale": Block(MixedOnMap, [(3, "Conv")], ["Conv"]),
    "batch-norm-into-linear": Block(
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)), [(1, "Gemm")], ["Gemm"], shape=(3, 6)
    ),
    "layer-scale-of-tokens": Block(
        lambda: nn.Sequential(nn.Linear(6, 5), LayerScale(5)), [(1, "MatMul")], ["MatMul", "Add"], shape=(3, 4, 6)
    ),
    "linear-widened-and-back": Block(
        lambda: nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6)), [(1, "MatMul")], ["MatMul", "Add"], shape=(3, 4, 6)
    ),
    "low-rank-beside-a-layer": Block(
        lambda: Branches(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 1, bias=False), nn.Linear(1, 6, bias=False))),
        [(2, "MatMul")],
        ["MatMul", "Add"],
        shape=(3, 4, 6),
    ),
    "summands-beside": Block(Partly, [(2, "Conv")], ["Sigmoid", "Mul", "Conv", "Add"]),
    "bottleneck": Block(
        lambda: nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), [], ["MatMul", "Add", "MatMul", "Add"], shape=(3, 4, 6)
    ),
    "depthwise-beside-pointwise": Block(
        lambda: Branches(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1)),
        [(2, "one operator would take 24,948 multiplications for a sample, now it is 7,392")],
        ["Conv", "Conv", "Add"],
    ),
    "diverse-with-another-border": Block(lambda: diverse(of_zeros=False), [(1, "Conv")] * 3 + [(2, "Conv")]),
}


def fold(graph: Graph) -> Outcome:
    return select(["fold-reparam-branches"]).run(graph)


def trained(block: Block) -> nn.Module:
    """The block in float64 with numbers in its BatchNorms as training leaves them."""
    torch.manual_seed(0)
    model = block.build()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.double().eval().requires_grad_(False)


def as_onnx(model: nn.Module, x: Tensor) -> onnx.ModelProto:
    """As torch writes it, its own folding of BatchNorms left out."""
    file = io.BytesIO()
    kept = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17, **kept)
    return onnx.load_from_string(file.getvalue())


def costs_after(outcome: Outcome) -> list[int]:
    return [r.multiplications_after or 0 for r in outcome.reparam]


def rows(outcome: Outcome) -> list[tuple[int, str]]:
    return sorted((r.branches, r.into if r.verdict == "rewrite" else r.reason) for r in outcome.reparam)


@pytest.mark.parametrize("name", BLOCKS)
def test_onnx_and_fx_fold_alike(name: str) -> None:
    block = BLOCKS[name]
    model, x = trained(block), torch.randn(block.shape, dtype=torch.float64)
    program = fold(read_program(torch.export.export(model, (x,))))
    file = fold(read(as_onnx(model, x)))
    assert rows(program) == rows(file) == list(block.rows)
    assert sorted(costs_after(program)) == sorted(costs_after(file))
    if block.left is not None:
        assert [n.op for n in program.graph.nodes] == list(block.left)
    if program.modified:
        found, expected = write(program.graph).module()(x), model(x)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
