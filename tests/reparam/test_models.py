"""Models with re-parameterised branches: as few convolutions as their authors' own merging, and the same numbers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import attnrewrite
from attnrewrite.localattention.site import Reparam
from examples.exporting import Exporter, export, import_torchvision
from examples.models.slide_transformer import DeformedShift
from tests.passes.rewritten import optimize, written
from tests.reparam import blocks
from tests.running import error, run

import_torchvision()
timm = pytest.importorskip("timm")
FOLD = ["fold-reparam-branches"]


@dataclass(frozen=True)
class Case:
    """A model as trained. convolutions: after its authors' merging; None: timm's reparameterize_model tells."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    convolutions: int | None = None
    linears: int = 0

    def model(self) -> nn.Module:
        """In eval mode, with statistics and scales that a forgotten one would show."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or "gamma" in name or "scale" in name:
                    parameter.copy_(
                        torch.rand_like(parameter) + 0.5 if "bias" not in name else torch.randn_like(parameter)
                    )
            for name, buffer in model.named_buffers():
                if "running_mean" in name:
                    buffer.normal_()
                elif "running_var" in name:
                    buffer.uniform_(0.5, 2.0)
        return model

    def merged(self, model: nn.Module) -> int:
        """Convolutions that remain after the authors' own merging."""
        if self.convolutions is not None:
            return self.convolutions
        merged = timm.utils.reparameterize_model(copy.deepcopy(model))
        return sum(isinstance(module, nn.Conv2d) for module in merged.modules())


MODELS = {
    "repvgg_a0": Case(partial(timm.create_model, "repvgg_a0"), (1, 3, 64, 64)),
    "mobileone_s0": Case(partial(timm.create_model, "mobileone_s0"), (1, 3, 64, 64)),
    "fastvit_t8": Case(partial(timm.create_model, "fastvit_t8"), (1, 3, 64, 64)),
    "repvit_m1": Case(partial(timm.create_model, "repvit_m1"), (1, 3, 64, 64)),
}
BLOCKS = {
    "acnet": Case(partial(blocks.AsymmetricConv, 6), (2, 6, 9, 11), 1),
    "acnet-cropped": Case(partial(blocks.AsymmetricConv, 6, padding=0), (2, 6, 9, 11), 1),
    "acnet-wide": Case(partial(blocks.AsymmetricConv, 6, padding=2), (2, 6, 9, 11), 1),
    "acnet-strided": Case(partial(blocks.AsymmetricConv, 6, stride=2), (2, 6, 9, 11), 1),
    "diverse-branch": Case(partial(blocks.DiverseBranch, 6), (2, 6, 9, 11), 1),
    "diverse-branch-5": Case(partial(blocks.DiverseBranch, 6, kernel=5), (2, 6, 9, 11), 1),
    "diverse-branch-strided": Case(partial(blocks.DiverseBranch, 6, stride=2), (2, 6, 9, 12), 1),
    "replknet": Case(partial(blocks.LargeKernelBlock, 6, kernel=13), (2, 6, 9, 11), 3),
    "unireplknet": Case(partial(blocks.DilatedBranches, 6), (2, 6, 9, 11), 1),
    "slide-transformer": Case(partial(DeformedShift, 6, 3), (2, 6, 9, 11), 1),
    "linears": Case(partial(blocks.ParallelLinears, 6), (5, 6), 0, linears=1),
}
CASES = MODELS | BLOCKS


def groups(found: tuple[Reparam, ...]) -> Counter[tuple[object, ...]]:
    """The groups of branches, as they came out: exporters may have folded a BatchNorm into what is before it."""
    return Counter(
        (r.verdict, r.branches, r.into, r.parameters_after, r.multiplications_after) for r in found if r.branches > 1
    )


# The other exporter writes the same models with other nodes; it takes seconds for each.
SPELLINGS = [(name, "torchscript") for name in CASES] + [
    pytest.param(name, "dynamo", marks=pytest.mark.slow) for name in CASES
]


@pytest.mark.parametrize(("name", "exporter"), SPELLINGS)
def test_as_few_convolutions_and_the_same_numbers(name: str, exporter: Exporter, tmp_path: Path) -> None:
    case = CASES[name]
    model, x = case.model(), torch.randn(case.shape, generator=torch.Generator().manual_seed(1))
    path = export(model, (x,), tmp_path / "model.onnx", exporter=exporter)
    outcome = optimize(path, FOLD)
    operators = Counter(node.op for node in outcome.graph.nodes)
    assert operators["Conv"] <= case.merged(model)
    assert operators["BatchNormalization"] == 0
    if case.linears:
        assert operators["Gemm"] + operators["MatMul"] == case.linears
    expected = run(path, {"x": x.numpy()})["y"]
    assert error(run(written(outcome), {"x": x.numpy()})["y"], expected) < 1e-5

    exact = model.double()
    with torch.no_grad():
        result = attnrewrite.optimize(exact, (x.double(),), passes=FOLD, compile=False)
        assert error(result.module(x.double()).numpy(), exact(x.double()).numpy()) < 1e-12
    assert groups(result.report.reparam) == groups(outcome.reparam)


UNTOUCHED = {
    "swin": Case(partial(timm.create_model, "swin_tiny_patch4_window7_224", depths=(2, 2)), (1, 3, 224, 224)),
    "vit": Case(partial(timm.create_model, "vit_tiny_patch16_224", depth=2), (1, 3, 224, 224)),
    "squeezenet": Case(lambda: __import__("torchvision").models.squeezenet1_1(), (1, 3, 64, 64)),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_models_without_branches_pass_through(name: str, tmp_path: Path) -> None:
    case = UNTOUCHED[name]
    path = export(case.model(), (torch.randn(case.shape),), tmp_path / "model.onnx", exporter="torchscript")
    outcome = optimize(path, FOLD)
    assert outcome.reparam == ()
    assert outcome.rewrites == {FOLD[0]: 0}
    untouched = optimize(path, [])
    assert [n.label for n in outcome.graph.nodes] == [n.label for n in untouched.graph.nodes]
