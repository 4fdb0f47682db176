"""The models that are measured, by name: a torch module, its input shapes and how it is exported.

Fixed names (`swin_tiny`) and families with the image size in the name (`unfold_k7_56`, `swinir_light_192`). Weights are
random, from one seed: what is exported and what torch runs are the same model. timm and spandrel (SwinIR, HAT) are
needed only for the models that come from them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEED = 0


@dataclass(frozen=True)
class Model:
    """build: the module, in any mode. shapes: of its float32 inputs. exporter: that of examples/exporting.py."""

    build: Callable[[], torch.nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    exporter: str = "dynamo"

    def module(self) -> torch.nn.Module:
        """The module in eval mode, with the same weights at every call."""
        import torch

        torch.manual_seed(SEED)
        return self.build().eval()


def _timm(name: str, **options: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        from examples.exporting import import_torchvision

        import_torchvision()
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build


def _image(size: int, batch: int = 1) -> tuple[tuple[int, ...], ...]:
    return ((batch, 3, size, size),)


def _unfold(kernel_size: int, size: int) -> Model:
    def build() -> torch.nn.Module:
        from examples.models.unfold_attention import UnfoldAttention

        return UnfoldAttention(96, 3, kernel_size)

    return Model(build, ((1, 96, size, size),))


def _unfold_core(kernel_size: int, size: int) -> Model:
    """Neighbourhood attention alone, on maps of query, key and value."""

    def build() -> torch.nn.Module:
        from examples.models.unfold_attention import UnfoldAttention

        class Core(UnfoldAttention):
            def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                query = q.reshape(-1, self.num_heads, self.head_dim, size * size) * self.head_dim**-0.5
                return self.attend(query, self.neighbours(k), self.neighbours(v)).reshape(q.shape)

        return Core(96, 3, kernel_size)

    return Model(build, ((1, 96, size, size),) * 3)


def _slide_swin(size: int) -> Model:
    def build() -> torch.nn.Module:
        from examples.models.slide_transformer import slide_swin_tiny

        return slide_swin_tiny()

    return Model(build, _image(size))


def _spandrel(name: str, size: int, **options: Any) -> Model:
    """An architecture of that package, trained on images of 64 x 64."""

    def build() -> torch.nn.Module:
        from examples.exporting import import_torchvision

        import_torchvision()
        architecture = importlib.import_module(f"spandrel.architectures.{name}")
        return getattr(architecture, name)(img_size=64, mlp_ratio=2, resi_connection="1conv", **options)

    return Model(build, _image(size), "torchscript")


def _swinir_light(size: int) -> Model:
    """SwinIR-light x2: 4 stages of 6 blocks, windows of 8, 60 channels."""
    sizes = {"window_size": 8, "depths": [6] * 4, "embed_dim": 60, "num_heads": [6] * 4}
    return _spandrel("SwinIR", size, upscale=2, upsampler="pixelshuffledirect", **sizes)


def _hat_s(size: int) -> Model:
    """HAT-S x4: 6 groups of 6 blocks, windows of 16 with overlapping cross-attention, 144 channels."""
    sizes = {"window_size": 16, "depths": [6] * 6, "embed_dim": 144, "num_heads": [6] * 6}
    ratios = {"compress_ratio": 24, "squeeze_factor": 24, "overlap_ratio": 0.5}
    return _spandrel("HAT", size, upscale=4, upsampler="pixelshuffle", **sizes, **ratios)


_FIXED: dict[str, Model] = {
    "slide_swin_tiny": _slide_swin(224),
    "swin_tiny": Model(_timm("swin_tiny_patch4_window7_224"), _image(224)),
    "swin_tiny_b8": Model(_timm("swin_tiny_patch4_window7_224"), _image(224, batch=8)),
    "swin_base": Model(_timm("swin_base_patch4_window7_224"), _image(224)),
    "swin_large": Model(_timm("swin_large_patch4_window7_224"), _image(224)),
    "swinv2_tiny": Model(_timm("swinv2_tiny_window8_256"), _image(256)),
    "maxvit_tiny": Model(_timm("maxvit_tiny_tf_224"), _image(224)),
    "sam_base_512": Model(_timm("samvit_base_patch16", img_size=512), _image(512), "torchscript"),
}
# By the name before the last underscore; what follows is the side of the image or map in pixels.
_FAMILIES: dict[str, Callable[[int], Model]] = {
    "unfold_k3": lambda size: _unfold(3, size),
    "unfold_k7": lambda size: _unfold(7, size),
    "slide_core_k7": lambda size: _unfold_core(7, size),
    "slide_swin_tiny": _slide_swin,
    "swinir_light": _swinir_light,
    "hat_s": _hat_s,
}

# The table of RESULTS.md, quick ones first.
MEASURED = (
    "unfold_k3_56",
    "unfold_k7_56",
    "unfold_k3_128",
    "unfold_k7_128",
    "slide_swin_tiny",
    "swin_tiny",
    "swin_tiny_b8",
    "swin_base",
    "swinv2_tiny",
    "maxvit_tiny",
    "swinir_light_64",
    "swinir_light_192",
    "sam_base_512",
    "hat_s_64",
    "hat_s_192",
)


def model(name: str) -> Model:
    """Raises ValueError for a name that is neither fixed nor a family with a size."""
    if name in _FIXED:
        return _FIXED[name]
    family, _, size = name.rpartition("_")
    if family in _FAMILIES and size.isdigit() and int(size) > 0:
        return _FAMILIES[family](int(size))
    families = ", ".join(f"{family}_SIZE" for family in _FAMILIES)
    raise ValueError(f"there is no model {name!r}; there are {', '.join(_FIXED)}, {families}")


def export(name: str, path: Path) -> None:
    """Write the model to an ONNX file."""
    import torch

    from examples.exporting import export as write

    entry = model(name)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(SEED)) for shape in entry.shapes]
    write(entry.module(), inputs, path, exporter="dynamo" if entry.exporter == "dynamo" else "torchscript")


if __name__ == "__main__":
    import sys

    export(sys.argv[1], Path(sys.argv[2]))
