"""torch's tensors, dtypes and symbolic sizes as the graph view has them: arrays, NumPy dtypes, `dims.Dim`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import sympy  # type: ignore[import-untyped]
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from attnrewrite.dims import Dim, Extent, Shape

_NUMPY: dict[torch.dtype, np.dtype] = {
    torch.bool: np.dtype(bool),
    torch.uint8: np.dtype(np.uint8),
    torch.int8: np.dtype(np.int8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
_TORCH = {there: here for here, there in _NUMPY.items()}


def numpy_dtype(dtype: torch.dtype) -> np.dtype | None:
    """None for complex and quantised numbers, which the graph view does not name."""
    return _NUMPY.get(dtype)


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """Raises KeyError for a dtype that torch lacks."""
    return _TORCH[dtype]


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """The elements of a real tensor; without a copy where torch and NumPy can share them."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """The elements of an array, copied."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def loader(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Reads the elements when somebody asks for them, also while graphs are traced."""

    def load() -> np.ndarray:
        with unset_fake_temporarily():
            return array_of(tensor)

    return load


def extent_of(size: int | torch.SymInt) -> Extent:
    """A size; what is no affine expression of symbols becomes a symbol of its own, named by the expression."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = sympy.expand(size.node.expr)
    terms: dict[str, int] = {}
    constant = 0
    for term, coefficient in expression.as_coefficients_dict().items():
        if not coefficient.is_Integer:
            return Dim(((str(expression), 1),))
        if term == 1:
            constant = int(coefficient)
        else:
            terms[str(term)] = terms.get(str(term), 0) + int(coefficient)
    return Dim(tuple(sorted(terms.items())), constant) if terms else constant


def shape_of(sizes: Sequence[int | torch.SymInt]) -> Shape:
    return tuple(extent_of(size) for size in sizes)
