"""The two ops as torch operators: their schemas, generated from `functions/spec.py`, and what they return for shapes.

    torch.ops.attnrewrite.flash_window_attention(query, key, value, bias, ..., num_heads=3, scale=0.25, ...) -> Tensor
    torch.ops.attnrewrite.flash_window_attention_extra_query(..., extra_query, ...) -> (Tensor, Tensor)
    torch.ops.attnrewrite.slide_attention(query, key, value, bias, ..., kernel_size=[3, 3], ...) -> Tensor
    torch.ops.attnrewrite.slide_attention_predicted(value, logits, bias, ..., predicted="logits", ...) -> Tensor

Operands and attributes are those of docs/ops.md, under the same names; the attributes are keyword arguments. Where an
attribute may be absent from a node, the argument may be absent from the call. softmax_dtype is a torch dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch._ops import OpOverload

from attnrewrite.functions.spec import DOMAIN, FlashWindowAttention, SlideAttention, Spec

LIBRARY = torch.library.Library(DOMAIN, "DEF")  # type: ignore[no-untyped-call]

# Schema type of every attribute; one with a default may be left out, as it may in a node.
_WINDOW_ATTRIBUTES = {
    "num_heads": "int",
    "scale": "float",
    "feature_size": "int[]",
    "window_size": "int[]",
    "shift_size": "int[]? = None",
    "shift_padded": "bool = False",
    "softmax_dtype": "ScalarType? = None",
    "mask_value": "float? = None",
    "key_size": "int[]? = None",
    "key_window_size": "int[]? = None",
    "key_stride": "int[]? = None",
    "key_offset": "int[]? = None",
    "key_dilation": "int[]? = None",
    "key_border": "str? = None",
    "shared_query": "bool = False",
    "relative_scale": "float = 1.0",
    "head_shifts": "int[]? = None",
}

_SLIDE_ATTRIBUTES = {
    "num_heads": "int",
    "scale": "float",
    "feature_size": "int[]",
    "kernel_size": "int[]",
    "dilation": "int[]? = None",
    "border": 'str = "zero"',
    "softmax_dtype": "ScalarType? = None",
    "stride": "int[]? = None",
    "key_size": "int[]? = None",
    "offset": "int[]? = None",
}

_PREDICTED_ATTRIBUTES = {
    **_SLIDE_ATTRIBUTES,
    "predicted": "str",
    "overlap_add": "bool = False",
    "upsampling": "int[]? = None",
}

_DTYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}


def dtype_of(number: int) -> torch.dtype:
    """The torch dtype of an ONNX TensorProto data type that a softmax may have."""
    return _DTYPES[number]


def number_of(dtype: torch.dtype) -> int:
    """The ONNX TensorProto data type of an operand."""
    if dtype not in _NUMBERS:
        raise TypeError(f"operands are of {', '.join(map(str, _NUMBERS))}, got {dtype}")
    return _NUMBERS[dtype]


@dataclass(frozen=True)
class Operator:
    """One torch operator. required, optional: its operands in order; attributes: name -> schema type."""

    name: str
    spec: type[FlashWindowAttention] | type[SlideAttention]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    attributes: Mapping[str, str]
    results: int = 1

    @property
    def operands(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    @property
    def overload(self) -> OpOverload:
        return getattr(torch.ops.attnrewrite, self.name).default

    @property
    def arguments(self) -> str:
        """The schema's arguments, as text."""
        operands = [*(f"Tensor {n}" for n in self.required), *(f"Tensor? {n}=None" for n in self.optional)]
        attributes = [
            f"{kind.split(' = ')[0]} {name}{''.join(f'={d}' for d in kind.split(' = ')[1:])}"
            for name, kind in self.attributes.items()
        ]
        return ", ".join([*operands, "*", *attributes])

    @property
    def schema(self) -> str:
        results = "Tensor" if self.results == 1 else f"({', '.join(['Tensor'] * self.results)})"
        return f"{self.name}({self.arguments}) -> {results}"


def _operators() -> tuple[Operator, ...]:
    maps = ("query", "key", "value")
    of_windows = tuple(n for n in FlashWindowAttention.operands if n not in (*maps, "extra_query"))
    of_neighbours = tuple(n for n in SlideAttention.operands if n not in (*maps, "logits"))
    return (
        Operator("flash_window_attention", FlashWindowAttention, maps, of_windows, _WINDOW_ATTRIBUTES),
        Operator(
            "flash_window_attention_extra_query",
            FlashWindowAttention,
            (*maps, "extra_query"),
            of_windows,
            _WINDOW_ATTRIBUTES,
            results=2,
        ),
        Operator("slide_attention", SlideAttention, maps, of_neighbours, _SLIDE_ATTRIBUTES),
        Operator(
            "slide_attention_predicted",
            SlideAttention,
            ("value", "logits"),
            ("bias", "value_padding"),
            _PREDICTED_ATTRIBUTES,
        ),
    )


OPERATORS = {operator.name: operator for operator in _operators()}

for _operator in OPERATORS.values():
    LIBRARY.define(_operator.schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def operator_of(overload: Any) -> Operator | None:
    """The operator an overload belongs to; None of any other call's target."""
    ours = isinstance(overload, OpOverload) and overload.namespace == DOMAIN
    return OPERATORS.get(overload._opname) if ours else None


def call(spec: Spec, operands: Mapping[str, Any]) -> tuple[OpOverload, tuple[Any, ...], dict[str, Any]]:
    """The overload, positional and keyword arguments that compute this op.

    operands: by name, whatever stands for tensors (torch.fx nodes, tensors), absent ones left out or None.
    """
    present = {name: operand for name, operand in operands.items() if operand is not None}
    operator = OPERATORS[_name(spec, present)]
    if unknown := [name for name in present if name not in operator.operands]:
        raise ValueError(f"{operator.name} has no operand {unknown[0]!r}")
    arguments = [present.get(name) for name in operator.operands]
    while arguments and arguments[-1] is None:
        arguments.pop()
    attributes = spec.attributes()
    number = attributes.pop("softmax_dtype")
    if number:
        attributes["softmax_dtype"] = dtype_of(number)
    kinds = {name: kind.split(" = ")[0] for name, kind in operator.attributes.items()}
    keywords = {n: bool(v) if kinds[n] == "bool" else v for n, v in attributes.items() if kinds[n] != "bool" or v}
    return operator.overload, tuple(arguments), keywords


def _name(spec: Spec, present: Mapping[str, Any]) -> str:
    if isinstance(spec, FlashWindowAttention):
        return "flash_window_attention_extra_query" if "extra_query" in present else "flash_window_attention"
    return "slide_attention_predicted" if spec.predicted else "slide_attention"


def spec_of(overload: OpOverload, keywords: Mapping[str, Any]) -> Spec:
    """The spec that a call's keyword arguments say; the inverse of `call`. Operands among them are passed over."""
    operator = OPERATORS[overload._opname]
    return _spec(operator.name, tuple((n, _hashable(v)) for n, v in keywords.items() if n in operator.attributes))


@lru_cache(maxsize=4096)
def _spec(name: str, keywords: tuple[tuple[str, Any], ...]) -> Spec:
    operator = OPERATORS[name]
    attributes = {key: value for key, value in keywords if value is not None}
    if missing := [n for n, kind in operator.attributes.items() if "=" not in kind and n not in attributes]:
        raise TypeError(f"{name} needs the argument {missing[0]!r}")
    axes = len(attributes["feature_size"])
    attributes["softmax_dtype"] = number_of(attributes["softmax_dtype"]) if "softmax_dtype" in attributes else 0
    if operator.spec is FlashWindowAttention:
        attributes.setdefault("shift_size", (0,) * axes)
    else:
        attributes.setdefault("dilation", (1,) * axes)
        attributes.setdefault("border", "zero")
    return operator.spec.from_attributes(attributes)


def _hashable(value: Any) -> Any:
    """Sizes that are symbolic become those of the example: an operator has one geometry."""
    return tuple(map(int, value)) if isinstance(value, (list, tuple)) else value


def bind(operator: Operator, args: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Spec, dict[str, Any]]:
    """A call's spec and its present operands by name, in the order of the spec's operands."""
    attributes = {name: value for name, value in keywords.items() if name in operator.attributes}
    operands = dict(zip(operator.operands, args, strict=False))
    if len(attributes) != len(keywords):
        operands |= {name: value for name, value in keywords.items() if name not in attributes}
    spec = _spec(operator.name, tuple((n, _hashable(v)) for n, v in attributes.items()))
    return spec, {name: operands[name] for name in spec.operands if operands.get(name) is not None}


# -- shapes -----------------------------------------------------------------------------------------------------------


def result_shapes(spec: Spec, operands: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Shapes of the op's results. Raises ValueError where an operand's shape is none that the op has."""
    shapes = tuple((name, operand.shape) for name, operand in operands.items())
    if all(isinstance(extent, int) for _, shape in shapes for extent in shape):
        _checked(spec, shapes)
    else:  # symbolic extents are no keys
        check_shapes(spec, dict(shapes))
    value = operands["value"]
    if isinstance(spec, SlideAttention):
        return ((value.shape[0], value.shape[1], *spec.output_size),)
    geometry, channels = spec.geometry, value.shape[-1]
    own = (value.shape[0], *geometry.feature_size, channels)
    if "extra_query" not in operands:
        return (own,)
    return own, (value.shape[0], geometry.num_windows, operands["extra_query"].shape[2], channels)


@lru_cache(maxsize=4096)
def _checked(spec: Spec, shapes: tuple[tuple[str, torch.Size], ...]) -> None:
    check_shapes(spec, dict(shapes))


def check_shapes(spec: Spec, shapes: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError naming the operand that has no shape of docs/ops.md, or the maps where their batches differ."""
    for name, wanted in _wanted(spec, _head_dims(spec, shapes), _extra(shapes)).items():
        if name in shapes and not any(_fits(shapes[name], form) for form in wanted):
            forms = " or ".join(f"[{', '.join('any' if e is None else _extent(e) for e in form)}]" for form in wanted)
            raise ValueError(f"{name} must have the shape {forms}, got {tuple(shapes[name])}")
    batches = {name: shapes[name][0] for name in ("query", "key", "value", "logits") if name in shapes}
    if all(isinstance(batch, int) for batch in batches.values()) and len(set(batches.values())) > 1:
        raise ValueError(f"{', '.join(batches)} must have one batch, got {tuple(batches.values())}")


# An extent of a form: an int, several that are all right, or None for any.
_Form = tuple[Any, ...]


def _fits(shape: Sequence[Any], form: _Form) -> bool:
    if len(shape) != len(form):
        return False
    return all(f is None or (e in f if isinstance(f, tuple) else e == f) for e, f in zip(shape, form, strict=True))


def _extent(form: Any) -> str:
    return " or ".join(map(str, form)) if isinstance(form, tuple) else str(form)


def _head_dims(spec: Spec, shapes: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """(d, dv); raises ValueError where the channels are not divided by the heads."""
    channel = -1 if isinstance(spec, FlashWindowAttention) else 1
    axes = len(spec.geometry.feature_size)
    dims = []
    for name in ("query" if "query" in shapes else "value", "value"):
        if len(shapes[name]) != axes + 2:
            raise ValueError(f"{name} must have {axes + 2} axes, got shape {tuple(shapes[name])}")
        channels = shapes[name][channel]
        if channels % spec.num_heads:
            raise ValueError(f"{spec.num_heads} heads do not divide the {channels} channels of {name}")
        dims.append(int(channels) // spec.num_heads)
    return dims[0], dims[1]


def _extra(shapes: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """Extra queries and extra keys of every window."""
    queries, keys = (shapes.get(f"extra_{name}", (0, 0, 0, 0)) for name in ("query", "key"))
    if len(queries) != 4 or len(keys) != 4:
        raise ValueError(f"extra tokens must have 4 axes, got shapes {tuple(queries)} and {tuple(keys)}")
    return int(queries[2]), int(keys[2])


@cache
def _wanted(spec: Spec, head_dims: tuple[int, int], extra: tuple[int, int]) -> dict[str, tuple[_Form, ...]]:
    """The forms that each operand's shape may have."""
    heads, (d, dv) = spec.num_heads, head_dims
    if isinstance(spec, SlideAttention):
        return _wanted_of_slides(spec, d, dv)
    geometry = spec.geometry
    tokens, keys, windows = geometry.tokens_per_window, geometry.keys_per_window, geometry.num_windows
    window, key_window = geometry.window_size, geometry.window_size
    if geometry.keys is not None:
        key_window = geometry.keys.window_size
    all_tokens, all_keys = tokens + extra[0], keys + extra[1]
    either = (1, windows)
    rows = sum(w * k for w, k in zip(window, key_window, strict=True))
    return {
        "query": ((None, *(window if spec.shared_query else geometry.feature_size), heads * d),),
        "key": ((None, *geometry.key_size, heads * d),),
        "value": ((None, *geometry.key_size, heads * dv),),
        "bias": ((either, heads, all_tokens, all_keys),),
        "mask": ((windows, (1, all_tokens), all_keys),),
        "key_padding": ((heads * d,),),
        "value_padding": ((heads * dv,),),
        "relative_position": (((1, heads), rows, d), ((1, heads), tokens * keys, d)),
        "logit_bias": ((None, either, (1, heads), (1, all_tokens), (1, all_keys)),),
        "extra_key": ((None, either, None, heads * d),),
        "extra_value": ((None, either, extra[1], heads * dv),),
        "extra_query": ((None, either, None, heads * d),),
    }


def _wanted_of_slides(spec: SlideAttention, d: int, dv: int) -> dict[str, tuple[_Form, ...]]:
    heads, geometry = spec.num_heads, spec.geometry
    slots, kernel = geometry.keys_per_query, geometry.kernel_size
    pixels = math.prod(geometry.feature_size)
    value = ((None, heads * dv, *geometry.key_size),)
    if spec.predicted:
        rows = heads * slots * spec.rows_per_pixel
        return {
            "value": value,
            "logits": ((None, rows, *geometry.feature_size),),
            "bias": ((heads, slots),),
            "value_padding": ((heads * dv,),),
        }
    return {
        "query": ((None, heads * d, *geometry.feature_size),),
        "key": ((None, heads * d, *geometry.key_size),),
        "value": value,
        "bias": (((1, heads), slots), ((1, heads), pixels, slots)),
        "key_kernel": (((d, heads * d), slots, *kernel),),
        "key_bias": (((d, heads * d), slots),),
        "value_kernel": (((dv, heads * dv), slots, *kernel),),
        "value_bias": (((dv, heads * dv), slots),),
        "key_padding": ((heads * d,),),
        "value_padding": ((heads * dv,),),
    }


def _meta(operator: Operator) -> Any:
    """What torch asks for where only shapes are known."""

    def meta(*args: Any, **keywords: Any) -> Any:
        spec, operands = bind(operator, args, keywords)
        value = operands["value"]
        results = tuple(value.new_empty(shape) for shape in result_shapes(spec, operands))
        return results[0] if operator.results == 1 else results

    return meta


for _operator in OPERATORS.values():
    torch.library.register_fake(f"{DOMAIN}::{_operator.name}", _meta(_operator), lib=LIBRARY)
