"""Images of any size: left whole with that reason, until --input-shape names one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

torch = pytest.importorskip("torch")

from tests.architectures.deployed import torchvision  # noqa: E402
from tests.architectures.frame import BOTH, TORCHSCRIPT  # noqa: E402
from tests.models.onnx_builder import Builder  # noqa: E402
from tests.models.onnx_moved_blocks import CHANNELS, GROUP, Layers  # noqa: E402
from tests.passes.rewritten import optimize  # noqa: E402


@pytest.fixture(scope="module", params=BOTH)
def swin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage of a Swin, its height and width symbolic as well as its batch."""
    model = torchvision("swin_transformer").SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2], num_heads=[3], window_size=[4, 4], num_classes=5,
        stochastic_depth_prob=0.0,
    ).eval()  # fmt: skip
    path = tmp_path_factory.mktemp("sizes") / "swin.onnx"
    names = {0: "batch", 2: "height", 3: "width"}
    old: dict[str, Any] = {"dynamo": False, "opset_version": 17, "dynamic_axes": {"x": names}}
    new: dict[str, Any] = {"dynamo": True, "external_data": False, "dynamic_shapes": (names,), "verbose": False}
    options = old if request.param == TORCHSCRIPT else new
    torch.onnx.export(model, (torch.zeros(2, 3, 60, 88),), path, input_names=["x"], **options)
    return path


def test_without_a_size_the_model_is_left_whole(command, tmp_path, swin):
    done = command("optimize", swin, "--no-compile", "--json", "-o", tmp_path / "out")
    assert done.code == 0
    sites = done.json["sites"]
    assert [(s["kind"], s["verdict"]) for s in sites] == [("other", "leave")] * 2
    for site in sites:
        assert "height and width of the input x are symbolic" in site["reason"]
        assert "--input-shape x=1x3xheightxwidth" in site["reason"]
    assert not any(n.domain == "attnrewrite" for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node)


@pytest.mark.parametrize(("shape", "size"), [("batchx3x60x88", (15, 22)), ("2x3x32x48", (8, 12))])
def test_with_a_size_it_is_specialised(command, tmp_path, swin, shape, size):
    out = tmp_path / "out"
    done = command("optimize", swin, "--no-compile", "--json", "-o", out, "--input-shape", f"x={shape}")
    assert done.code == 0
    sites = done.json["sites"]
    assert [(s["verdict"], tuple(s["feature_size"]), tuple(s["shift_size"])) for s in sites] == [
        ("rewrite", size, (0, 0)),
        ("rewrite", size, (2, 2)),
    ]
    assert sites[1]["mask"] == "shift"


def test_attention_over_tokens_of_a_fixed_number_keeps_its_own_reason():
    """The image is of any size, its summary is not."""
    g = Builder()
    x = g.input("x", ["batch", "height", "width", CHANNELS])
    mean = g.reshape(g.op("ReduceMean", x, axes=[1, 2]), -1, 1, CHANNELS)
    layers = Layers(g, GROUP)
    tokens = g.add(mean, layers.weights(1, GROUP, CHANNELS))
    outcome = optimize(g.model({"y": layers.attention(tokens)}))
    (site,) = outcome.sites
    assert (site.kind, site.verdict) == ("global", "leave")
