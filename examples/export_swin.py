"""Write a Swin Transformer as an ONNX file: the one of examples/models, or timm's.

python examples/export_swin.py -o swin.onnx
python examples/export_swin.py --timm --exporter torchscript --dynamic-batch -o swin.onnx
python examples/export_swin.py --height 200 --width 312 -o swin_padded.onnx
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import command
import typer
from exporting import DEFAULT_OPSET, import_torchvision
from models.common import randomize_
from models.swin import Swin, small_swin
from torch import nn

TIMM_NAME = "swin_tiny_patch4_window7_224"


def main(
    output: command.Output = Path("swin.onnx"),
    timm: Annotated[bool, typer.Option("--timm", help=f"timm's {TIMM_NAME} (pip install timm).")] = False,
    small: Annotated[bool, typer.Option("--small", help="Two stages of two blocks, for trying things out.")] = False,
    height: Annotated[int, typer.Option(help="Image height in pixels.")] = 224,
    width: Annotated[int, typer.Option(help="Image width in pixels.")] = 224,
    exporter: command.Exporter = command.ExporterChoice.dynamo,
    opset: command.Opset = DEFAULT_OPSET,
    dynamic_batch: command.DynamicBatch = False,
    fp16: command.Fp16 = False,
    seed: command.Seed = 0,
) -> None:
    """Export Swin-T with random weights."""
    if timm:
        model = timm_swin(height, width)
    else:
        model = small_swin((height, width)) if small else Swin((height, width))
    command.write(randomize_(model, seed), (1, 3, height, width), output, exporter, opset, dynamic_batch, fp16)


def timm_swin(height: int, width: int) -> nn.Module:
    import_torchvision()
    try:
        import timm
    except ModuleNotFoundError:
        raise typer.BadParameter("timm is not installed: pip install timm", param_hint="--timm") from None
    model: nn.Module = timm.create_model(TIMM_NAME, pretrained=False, img_size=(height, width))
    return model


if __name__ == "__main__":
    typer.run(main)
