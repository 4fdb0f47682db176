"""What is found in a torch.fx graph is what is found in the ONNX file of the same model."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch

from attnrewrite import passes
from attnrewrite.frontend import onnx as onnx_frontend
from attnrewrite.frontend.fx.read import read
from attnrewrite.localattention.site import Site
from attnrewrite.pipeline import Pipeline
from tests.frontend.fx.reading import assert_computes, exported
from tests.models.build import MODELS, SMALL, build_model
from tests.models.build import exported as onnx_file
from tests.zoo.models import MODELS as ZOO

QUICK = ("timm_maxvit", "timm_gcvit", "tv_swin3d", "hf_sam_vision")


def alike(site: Site) -> Site:
    """A site without what each of the two graphs calls its nodes."""
    return replace(site, id="", node="", reason="", reason_node="")


def found_in_both(name: str, *, dynamic_batch: bool) -> tuple[list[Site], list[Site]]:
    model, x = build_model(name), torch.randn(2 if dynamic_batch else 1, *MODELS[name].input_shape[1:])
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},) if dynamic_batch else None
    pipeline = Pipeline(passes.ALL)
    here = pipeline.run(exported(model, (x,), dynamic_shapes=shapes)).sites
    there = pipeline.run(onnx_frontend.read(onnx_file(name, dynamic_batch=dynamic_batch))).sites
    return [alike(s) for s in here], [alike(s) for s in there]


@pytest.mark.parametrize("name", ["small_swinv2_timm", "unfold_k3_30x41"])
def test_sites_are_those_of_the_onnx_file(name: str) -> None:
    here, there = found_in_both(name, dynamic_batch=False)
    assert here == there and here[0].verdict == "rewrite"


@pytest.mark.parametrize("name", ["small_swin_padded", "small_slide"])
def test_sites_of_a_symbolic_batch_are_those_of_the_onnx_file(name: str) -> None:
    here, there = found_in_both(name, dynamic_batch=True)
    assert here == there and here[0].verdict == "rewrite"


@pytest.mark.slow
@pytest.mark.parametrize("dynamic_batch", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_sites_of_every_model(name: str, dynamic_batch: bool) -> None:
    here, there = found_in_both(name, dynamic_batch=dynamic_batch)
    assert here == there


def check_zoo(name: str, *, decomposed: bool = False) -> None:
    model = ZOO[name]
    if not model.installed:
        pytest.skip(f"{model.distribution} is not installed")
    module = model.build().eval()
    with torch.no_grad():
        program = torch.export.export(module, model.examples())
        program = program.run_decompositions() if decomposed else program
    assert not model.complaints(Pipeline(passes.ALL).run(read(program)).sites)


@pytest.mark.parametrize("name", QUICK)
def test_zoo(name: str) -> None:
    check_zoo(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm_maxvit", "timm_swin_sdpa", "timm_davit", "hf_swin_padded"])
def test_zoo_in_core_operators(name: str) -> None:
    check_zoo(name, decomposed=True)


# Where torch.export gives other graphs than the ONNX exporters: what the difference is.
OTHERWISE = {
    "timm_convit": "softmaxes of constants are computed when the graph is read",
    "sp_atd": "the ONNX exporters cannot write it; the groups of sorted tokens are found as well",
    "local_transformer": "left for another reason: heads do not leave the batch",
    "hf_longformer": "torch.export stops at control flow that depends on data",
    "hf_dinat": "needs a package that cannot be installed",
    "studiosr_swinir": "needs a package that is not installed",
    "studiosr_swinfir": "needs a package that is not installed",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in QUICK and name not in OTHERWISE])
def test_rest_of_the_zoo(name: str) -> None:
    check_zoo(name)


def test_graph_view_computes_what_the_model_does() -> None:
    model, x = build_model("small_swin_padded"), torch.randn(1, *MODELS["small_swin_padded"].input_shape[1:])
    assert_computes(exported(model, (x,)), model, (x,), bound=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_graph_view_computes_what_every_small_model_does(name: str) -> None:
    model, x = build_model(name), torch.randn(1, *MODELS[name].input_shape[1:])
    assert_computes(exported(model, (x,)), model, (x,), bound=1e-5)
