"""What an entry of the table from ONNX operators to torch functions is, and what the entries share.

An entry is a function of the node and its operands that calls `torch.ops.aten` overloads and nothing else on tensors:
so it computes with tensors, is differentiable, runs on fake tensors, and can be recorded call by call into a torch.fx
graph of any dialect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from attnrewrite.frontend.fx import tensors
from attnrewrite.graph import Node

aten = torch.ops.aten

Extent = int | torch.SymInt
# A tensor; the known elements of an operand (dtype object where some are SymInts); a number; None for an absent one.
Operand = Any
Entry = Callable[..., torch.Tensor | list[torch.Tensor]]


class NotInTorch(ValueError):
    """A node that no entry can express; the message names the operator and what of it."""


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    entry: called with the node, then its operands, absent trailing ones left out. contents: the operands that it takes
    as arrays (shapes, axes, bounds). numbers: those that it takes as Python numbers where they are constants of one
    element that do not add an axis. device: whether it makes a tensor from nothing, and is told where (`device=`).
    """

    entry: Entry
    contents: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    device: bool = False


def ints(array: np.ndarray | torch.Tensor) -> list[Extent]:
    """The elements of a shape, of axes or of bounds."""
    if isinstance(array, torch.Tensor):
        return array.reshape(-1).tolist()
    return [x if isinstance(x, torch.SymInt) else int(x) for x in np.asarray(array).reshape(-1)]


def static_ints(array: np.ndarray | torch.Tensor) -> list[int]:
    return [int(x) for x in ints(array)]


def number(operand: Any) -> Any:
    """The one element of an operand as a Python number."""
    return operand.reshape(-1)[0].item() if isinstance(operand, torch.Tensor | np.ndarray) else operand


def axes_of(node: Node, axes: np.ndarray | None, rank: int) -> list[int] | None:
    """The axes of an operand or of the attribute, counted from the front; None where there are none."""
    found = static_ints(axes) if axes is not None else node.attributes.get("axes")
    return None if found is None else [int(a) % max(rank, 1) for a in found]


def torch_dtype(data_type: int) -> torch.dtype:
    """The torch dtype of an ONNX TensorProto data type."""
    return dtype_of(onnx.helper.tensor_dtype_to_np_dtype(data_type))


def dtype_of(dtype: np.dtype) -> torch.dtype:
    """The torch dtype of a NumPy one, bfloat16 included."""
    try:
        return tensors.torch_dtype(dtype)
    except KeyError as error:
        raise NotInTorch(f"a tensor of {dtype}") from error


def tensor_of(array: np.ndarray, device: torch.device | str | None = None) -> torch.Tensor:
    """A copy of an array as a tensor, a real one also where tensors are fake."""
    with unset_fake_temporarily():
        return tensors.tensor_of(np.ascontiguousarray(array).reshape(array.shape)).to(device)


def text(value: Any) -> str:
    """A string attribute, which ONNX readers give as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def index_tensor(positions: Sequence[int] | np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """int64 positions on the device of another tensor."""
    return tensor_of(np.asarray(positions, np.int64), like.device)
