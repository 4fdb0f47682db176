"""Which kernel of TVM's computes a call: that of the spec, the operands' shapes without the batch, and the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnrewrite.functions.spec import FlashWindowAttention, Spec

Step = int | None

MAPS = ("query", "key", "value")
# Operands whose first axis is the batch, at least where it is not 1.
_BATCHED = (*MAPS, "logits", "logit_bias")
# Operands that GPU kernels take in float32 beside maps of another dtype.
_ADDED_TO_LOGITS = ("bias", "mask", "logit_bias")

CPU = "cpu"
_META = torch.device("meta")
_HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_BFLOAT16_SINCE = 80


@dataclass(frozen=True)
class Kernel:
    """What is compiled. shapes: of the operands, None for a batch. steps: of maps that are parts of wider ones (`steps`
    of the kernels in lowering/kernels). device: cpu, or a GPU's architecture, as in sm_90. dtypes: of the operands.
    """

    spec: Spec
    shapes: tuple[tuple[str, tuple[int | None, ...]], ...]
    steps: tuple[tuple[str, int], ...]
    device: str
    dtypes: tuple[tuple[str, str], ...]

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return CPU if self.device == CPU else "cuda"

    def request(self) -> dict[str, Any]:
        return {
            "op": self.spec.op_type,
            "attributes": self.spec.attributes(),
            "shapes": dict(self.shapes),
            "steps": dict(self.steps),
            "device": self.device,
            "dtypes": dict(self.dtypes),
        }


def kernel_of(spec: Spec, operands: Mapping[str, Tensor], device: str | None = None) -> Kernel | None:
    """The kernel for these operands (of which only device, dtypes, shapes and strides are read); None where there is
    none for their dtypes or their device, or where they are on several. device: of `Kernel`; None: the operands' own.
    """
    if spec.softmax_dtype not in (0, 1) or len({t.device for t in operands.values()} - {_META}) > 1:
        return None
    device = device or _device_of(operands["value"].device)
    if device == CPU and all(t.dtype == torch.float32 for t in operands.values()):
        return Kernel(spec, _shapes(operands, MAPS), _steps(spec, operands), CPU, _dtypes(operands, "float32"))
    if device is None or device == CPU or len({operands[n].dtype for n in MAPS if n in operands}) > 1:
        return None
    dtype = _gpu_dtype(operands["value"].dtype, int(device.removeprefix("sm_")))
    if dtype is None:
        return None
    return Kernel(spec, _shapes(operands, _BATCHED), _steps(spec, operands), device, _dtypes(operands, dtype))


def indices_fit(kernel: Kernel, operands: Mapping[str, Tensor], results: Sequence[Sequence[int]]) -> bool:
    """Whether indices of 32 bits, which GPU kernels have, reach all elements. results: their shapes."""
    steps, axis = dict(kernel.steps), -1 if isinstance(kernel.spec, FlashWindowAttention) else 1
    counts = [t.numel() // t.shape[axis] * steps[n] if n in steps else t.numel() for n, t in operands.items()]
    return kernel.device == CPU or max(*counts, *map(math.prod, results)) < 2**31


def _device_of(device: torch.device) -> str | None:
    if device.type in ("cpu", "meta"):
        return CPU
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return _architecture(device)


@cache
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _gpu_dtype(dtype: torch.dtype, architecture: int) -> str | None:
    if dtype == torch.bfloat16 and architecture < _BFLOAT16_SINCE:
        return None
    return "float32" if dtype == torch.float32 else _HALVES.get(dtype)


def _dtypes(operands: Mapping[str, Tensor], dtype: str) -> tuple[tuple[str, str], ...]:
    """Those that the operands are given in: that of the maps, or float32."""
    maps = operands["value"].dtype
    wide = [name for name in _ADDED_TO_LOGITS if name in operands and operands[name].dtype != maps]
    return tuple((name, "float32" if name in wide else dtype) for name in operands)


def _shapes(operands: Mapping[str, Tensor], batched: tuple[str, ...]) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
    """What is the batch is None; a term of the logits that all images share has an axis of extent 1 there."""
    shapes: list[tuple[str, tuple[int | None, ...]]] = []
    for name, operand in operands.items():
        first, *rest = operand.shape
        any_batch = name in batched and (name in MAPS or first != 1)
        shapes.append((name, (None if any_batch else int(first), *map(int, rest))))
    return tuple(shapes)


def _steps(spec: Spec, operands: Mapping[str, Tensor]) -> tuple[tuple[str, int], ...]:
    step_of = _pixel_step if isinstance(spec, FlashWindowAttention) else _image_step
    found = {name: step_of(operands[name]) for name in MAPS if name in operands}
    return tuple((name, step) for name, step in found.items() if step)


def _pixel_step(feature_map: Tensor) -> Step:
    """Numbers from one pixel to the next of [B, *S, C] where that is a part of a wider map, channels side by side."""
    *_, channels = feature_map.shape
    strides, expected = feature_map.stride(), feature_map.stride(-2)
    if strides[-1] != 1 or expected <= channels:
        return None
    if any(s != expected * math.prod(feature_map.shape[a + 1 : -1]) for a, s in enumerate(strides[:-1]) if a):
        return None
    return expected if _batch_follows(feature_map, expected * math.prod(feature_map.shape[1:-1])) else None


def _image_step(feature_map: Tensor) -> Step:
    """Channels from one image to the next of [B, C, *S] where that is a part of a wider map, pixels side by side."""
    strides = feature_map.stride()
    if any(s != math.prod(feature_map.shape[a + 1 :]) for a, s in enumerate(strides) if a):
        return None
    step, rest = divmod(strides[0], math.prod(feature_map.shape[2:]))
    return int(step) if not rest and step > feature_map.shape[1] else None


def _batch_follows(feature_map: Tensor, stride: int) -> bool:
    batch = feature_map.shape[0]
    return (isinstance(batch, int) and batch == 1) or feature_map.stride(0) == stride
