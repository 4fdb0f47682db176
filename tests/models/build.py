"""Exported models for tests, each built once: `exported("small_swin", "dynamo")` is a path to an ONNX file.

Beside each file lie the inputs it was tried with and PyTorch's outputs, in float32: `references(path)`. Files go to the
folder named by ATTNREWRITE_TEST_CACHE, where later runs find them, or else to a temporary folder of this process.
Parameters are random (`randomize_`): at their initial values bias tables are zero and softmaxes flat, which hides wrong
rewrites.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CACHE_VARIABLE = "ATTNREWRITE_TEST_CACHE"
_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_SOURCES = (Path(__file__), _EXAMPLES / "exporting.py", *sorted((_EXAMPLES / "models").glob("*.py")))


@dataclass(frozen=True)
class ModelCase:
    """How to build a model: `build()` gives a torch module taking a float32 array of `input_shape`.

    softmaxes: the Softmax nodes its export holds. small: builds and exports in about a second or two. sources: files
    beside examples/ whose edit makes the export a new one.
    """

    build: Callable[[], Any]
    input_shape: tuple[int, ...]
    softmaxes: int
    small: bool = True
    sources: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Reference:
    """Inputs by name (in the model's dtype) and the outputs PyTorch computed for them, in float32."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def _timm(name: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        from examples.exporting import import_torchvision

        import_torchvision()
        timm = pytest.importorskip("timm")
        return timm.create_model(name, pretrained=False, **options)

    return build


def _swin_t_torchvision() -> Any:
    from examples.exporting import import_torchvision

    import_torchvision()
    return pytest.importorskip("torchvision.models").swin_t(weights=None)


def _vit() -> Any:
    from examples.exporting import import_torchvision

    import_torchvision()
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    return vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=10
    )


def _own(module: str, factory: str, *args: Any, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        import importlib

        return getattr(importlib.import_module(f"examples.models.{module}"), factory)(*args, **options)

    return build


def _fp32_softmax(module: str, factory: str, *args: Any) -> Callable[[], Any]:
    def build() -> Any:
        import torch

        return _own(module, factory, *args, softmax_dtype=torch.float32)()

    return build


def _unfold(kernel_size: int, size: tuple[int, int], dilation: int = 1, **options: Any) -> ModelCase:
    build = _own("unfold_attention", "UnfoldAttention", 96, 3, kernel_size, dilation, **options)
    return ModelCase(build, (1, 96, *size), softmaxes=1)


MODELS: dict[str, ModelCase] = {
    "swin_tiny_timm": ModelCase(_timm("swin_tiny_patch4_window7_224"), (1, 3, 224, 224), 12, small=False),
    "swinv2_tiny_timm": ModelCase(_timm("swinv2_tiny_window8_256"), (1, 3, 256, 256), 12, small=False),
    "swin_t_torchvision": ModelCase(_swin_t_torchvision, (1, 3, 224, 224), 12, small=False),
    "slide_swin_tiny": ModelCase(_own("slide_transformer", "slide_swin_tiny"), (1, 3, 224, 224), 12, small=False),
    "swin_tiny": ModelCase(_own("swin", "Swin"), (1, 3, 224, 224), 12, small=False),
    "vit_timm": ModelCase(_vit, (1, 3, 64, 64), 2),
    "resnet": ModelCase(_timm("resnet18", num_classes=10), (1, 3, 64, 64), 0),
    "small_swin": ModelCase(_own("swin", "small_swin"), (1, 3, 64, 96), 4),
    "small_swin_padded": ModelCase(_own("swin", "small_swin", (60, 88)), (1, 3, 60, 88), 4),
    "small_swin_shift_then_pad": ModelCase(_own("swin", "small_swin", (60, 88), pad_first=False), (1, 3, 60, 88), 4),
    "small_swin_fp32_softmax": ModelCase(_fp32_softmax("swin", "small_swin"), (1, 3, 64, 96), 4),
    "small_slide": ModelCase(_own("slide_transformer", "small_slide_swin"), (1, 3, 48, 80), 4),
    "small_slide_k5": ModelCase(_own("slide_transformer", "small_slide_swin", kernel_size=5), (1, 3, 48, 80), 4),
    "small_slide_shared": ModelCase(
        _own("slide_transformer", "small_slide_swin", shared_shift=True), (1, 3, 48, 80), 4
    ),
    "small_slide_fp32_softmax": ModelCase(_fp32_softmax("slide_transformer", "small_slide_swin"), (1, 3, 48, 80), 4),
    "small_swin_timm": ModelCase(
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=(60, 88),
            window_size=4,
            embed_dim=30,
            depths=(2, 2),
            num_heads=(3, 6),
            num_classes=10,
        ),
        (1, 3, 60, 88),
        4,
    ),
    "small_swinv2_timm": ModelCase(
        _timm(
            "swinv2_tiny_window8_256",
            img_size=(64, 96),
            window_size=4,
            embed_dim=30,
            depths=(2, 2),
            num_heads=(3, 6),
            num_classes=10,
        ),
        (1, 3, 64, 96),
        4,
    ),
    "unfold_net": ModelCase(_own("unfold_attention", "UnfoldNet", 30, 3, num_classes=10), (1, 3, 52, 68), 3),
}
for _kernel in (3, 5, 7):
    MODELS[f"unfold_k{_kernel}"] = _unfold(_kernel, (56, 56))
    MODELS[f"unfold_k{_kernel}_30x41"] = _unfold(_kernel, (30, 41))
    MODELS[f"unfold_k{_kernel}_dilated"] = _unfold(_kernel, (56, 56), 2)
    MODELS[f"unfold_k{_kernel}_30x41_dilated"] = _unfold(_kernel, (30, 41), 2)
for _contraction in ("einsum", "sum"):
    MODELS[f"unfold_k3_{_contraction}"] = _unfold(3, (30, 41), contraction=_contraction, relative_bias=True)

SMALL = tuple(name for name, case in MODELS.items() if case.small)


def build_model(name: str, *, half: bool = False, case: ModelCase | None = None) -> Any:
    """The torch module `name` in eval mode, its parameters random (always the same ones); float16 where `half`."""
    import torch

    from examples.models.common import randomize_

    torch.manual_seed(0)
    model = randomize_((case or MODELS[name]).build(), seed=0).eval()
    return model.half() if half else model


def exported(
    name: str,
    exporter: str = "dynamo",
    *,
    opset: int = 18,
    dynamic_batch: bool = False,
    half: bool = False,
    external_data: bool = False,
    case: ModelCase | None = None,
) -> Path:
    """Path of the ONNX file of MODELS[name], built at the first call; skips the test where its packages are missing.

    dynamic_batch: batch is symbolic, and the references hold batches 1, 2 and 5; otherwise batch 1. half: float16
    weights, input and output. external_data: the weights lie in a second file beside it. case: the model, where it is
    none of MODELS.
    """
    pytest.importorskip("torch")
    options = f"{exporter}-{opset}{'-dynamic' * dynamic_batch}{'-half' * half}{'-external' * external_data}"
    case = case or MODELS[name]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in case.sources)).hexdigest()[:16]
    folder = _cache() / f"{name}-{options}{f'-{digest}' * bool(case.sources)}"
    path = folder / f"{name}.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:  # parallel test processes share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(name, case, path, exporter, opset, dynamic_batch, half, external_data)
    return path


def references(path: Path) -> list[Reference]:
    """What the exported model must compute, one Reference per batch size tried."""
    with np.load(path.with_suffix(".npz")) as arrays:
        batches = sorted({int(key.split(":")[0]) for key in arrays})
        return [Reference({"x": arrays[f"{batch}:x"]}, {"y": arrays[f"{batch}:y"]}) for batch in batches]


def _build(
    name: str,
    case: ModelCase,
    path: Path,
    exporter: Any,
    opset: int,
    dynamic_batch: bool,
    half: bool,
    external_data: bool,
) -> None:
    import torch

    from examples.exporting import export

    model = build_model(name, half=half, case=case)
    _, *shape = case.input_shape
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(batch, *shape, generator=generator) for batch in ((1, 2, 5) if dynamic_batch else (1,))]
    samples = [x.half() if half else x for x in samples]
    arrays: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for x in samples:
            arrays[f"{len(x)}:x"], arrays[f"{len(x)}:y"] = x.numpy(), model(x).float().numpy()
    # Built aside, then moved into place with the model last: an interrupted run leaves no half of one.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = export(
            model,
            samples[:1],
            Path(scratch) / path.name,
            exporter=exporter,
            opset=opset,
            dynamic_batch=dynamic_batch,
            external_data=external_data,
        )
        np.savez(written.with_suffix(".npz"), **arrays)
        for file in sorted(Path(scratch).iterdir(), key=lambda f: f == written):  # the .onnx file last
            os.replace(file, path.parent / file.name)


@functools.cache
def _cache() -> Path:
    """The folder of this state of the sources: an edit of a model or of this file leaves the old exports behind."""
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    for package in ("onnxscript", "timm", "torchvision"):
        with contextlib.suppress(PackageNotFoundError):
            digest.update(version(package).encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    root = os.environ.get(CACHE_VARIABLE)
    if root is None:
        root = tempfile.mkdtemp(prefix="attnrewrite-models-")
        atexit.register(shutil.rmtree, root, ignore_errors=True)
    return Path(root) / digest.hexdigest()[:16]
