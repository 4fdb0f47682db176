"""Parallel convolutions of one input, summed, as one convolution.

Matches
    Conv(x, W1, b1) + Conv(x, W2, b2) + ... + x, equal stride and groups, odd kernels padded to keep their centre; x
    itself, where it is a summand, is a convolution with 1 at the centre.
Rewrites to
    Conv(x, sum of the kernels around their common centre, sum of the biases).
Exact when
    every branch reads the same input with zero padding p_i = dilation * (k_i // 2): then kernel i embedded in the
    largest kernel reads the same elements, a dilated one with zeros between its taps. Weights are summed in float64
    and rounded once.
Declines when
    strides, groups or centres differ, a weight is computed, a branch value is used elsewhere, or dilations differ so
    much that the one kernel would hold more taps than the branches together.
Source
    Slide-Transformer's deformed shifting module, https://arxiv.org/abs/2304.04237; RepVGG,
    https://arxiv.org/abs/2101.03697; dilated branches, https://arxiv.org/abs/2311.15599.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from attnrewrite.dims import static
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.localattention.site import Decline, Reparam
from attnrewrite.pipeline import Pass

NAME = "fold-reparam-branches"


@dataclass(frozen=True, eq=False)
class Branches:
    """The sum node (Add or Sum), its convolutions over one input [B, C, *S], and the constants added beside them.

    identities: how often the input itself is a summand. dilation: of the one convolution, per axis.
    """

    total: Node
    convolutions: tuple[Node, ...]
    offsets: tuple[Value, ...]
    identities: int
    dilation: tuple[int, ...]

    @property
    def first(self) -> Node:
        return self.convolutions[0]


def match_branches(facts: Facts, node: Node) -> Branches | Decline | None:
    """The branches that meet in a sum; the outermost sum of a nest is the anchor."""
    if not _is_sum(node) or any(_is_sum(u) and facts.only_user(node.output) is u for u in facts.users(node.output)):
        return None
    leaves = _leaves(facts, node)
    inputs = [node.required(0) for node in (v.producer for v in leaves) if _is_conv(node)]
    itself = [v for v in leaves if v in inputs]  # the input as a summand, which may come from a convolution as well
    convolutions = [node for node in (v.producer for v in leaves if v not in itself) if _is_conv(node)]
    if not convolutions or len(convolutions) + len(itself) < 2:
        return None
    if len({id(v) for v in (*itself, *(c.required(0) for c in convolutions))}) != 1:
        return None
    first = convolutions[0]
    rest = [v for v in leaves if v not in itself and v.producer not in convolutions]
    if any(not v.is_constant or not _per_channel(v, first) for v in rest):
        return Decline(
            "a summand beside the convolutions is neither one of them nor a constant per channel", node.label
        )
    for conv in convolutions:
        if facts.only_user(conv.output) is None:
            return Decline("the result of a branch is used elsewhere as well", conv.label)
        if conv.constant(1) is None or (conv.input(2) is not None and conv.constant(2) is None):
            return Decline("a branch computes its weights", conv.label)
        if _sizes(conv, "strides") != _sizes(first, "strides"):
            return Decline("the branches have different strides", conv.label)
        if conv.attributes.get("group", 1) != first.attributes.get("group", 1):
            return Decline("the branches have different groups", conv.label)
        if not _centred(conv):
            return Decline("a branch's padding does not keep its kernel centred", conv.label)
    if itself and itself[0].known_shape != first.output.known_shape:
        return Decline("the input is a summand, but not of the shape that the convolutions return", first.label)
    dilation = _common_dilation(convolutions)
    taps = [math.prod(_spatial(c)) for c in convolutions]
    size = math.prod(max(extents) for extents in zip(*(_extents(c, dilation) for c in convolutions), strict=True))
    if len({_sizes(c, "dilations") for c in convolutions}) > 1 and size > sum(taps):
        return Decline(
            f"the branches have different dilations: one kernel for all would have {size} taps, they have {sum(taps)}",
            node.label,
        )
    return Branches(node, tuple(convolutions), tuple(rest), len(itself), dilation)


def _common_dilation(convolutions: Sequence[Node]) -> tuple[int, ...]:
    """The largest dilation per axis with which one kernel can hold the taps of all."""
    reach = [
        [d if k > 1 else 0 for k, d in zip(_spatial(c), _sizes(c, "dilations"), strict=True)] for c in convolutions
    ]
    return tuple(math.gcd(*axis) or 1 for axis in zip(*reach, strict=True))


def _extents(conv: Node, dilation: tuple[int, ...]) -> tuple[int, ...]:
    """The kernel's extents, written with another dilation that divides its own."""
    steps = zip(_spatial(conv), _sizes(conv, "dilations"), dilation, strict=True)
    return tuple((k - 1) * (own // common) + 1 for k, own, common in steps)


def _is_conv(node: Node | None) -> TypeGuard[Node]:
    return node is not None and node.op == "Conv" and node.domain == STANDARD_DOMAIN


def _is_sum(node: Node) -> bool:
    return node.op in ("Add", "Sum") and node.domain == STANDARD_DOMAIN


def _leaves(facts: Facts, node: Node) -> list[Value]:
    """Summands of nested sums; a sum used elsewhere is a summand of its own."""
    leaves: list[Value] = []
    for value in node.inputs:
        if value is None:
            continue
        inner = value.producer
        if inner is not None and _is_sum(inner) and facts.only_user(value) is not None:
            leaves.extend(_leaves(facts, inner))
        else:
            leaves.append(value)
    return leaves


def _spatial(conv: Node) -> tuple[int, ...]:
    return tuple(static(e) for e in conv.required(1).known_shape[2:])


def _sizes(conv: Node, what: str) -> tuple[int, ...]:
    return tuple(conv.attributes.get(what) or [1] * len(_spatial(conv)))


def _centred(conv: Node) -> bool:
    kernel = _spatial(conv)
    pads = list(conv.attributes.get("pads") or [0] * (2 * len(kernel)))
    same = [d * (k // 2) for k, d in zip(kernel, _sizes(conv, "dilations"), strict=True)]
    return (
        conv.attributes.get("auto_pad", "NOTSET") == "NOTSET" and all(k % 2 for k in kernel) and pads == [*same, *same]
    )


def _per_channel(value: Value, conv: Node) -> bool:
    """A constant [C, 1, 1] or [1, C, 1, 1] or a scalar: it is a bias."""
    shape = value.shape
    channels = conv.output.shape[1] if conv.output.shape is not None else None
    if shape is None or channels is None:
        return False
    rank = len(_spatial(conv)) + 2
    full = (1,) * (rank - len(shape)) + tuple(shape)
    return len(full) == rank and full[1] in (1, channels) and all(e == 1 for a, e in enumerate(full) if a != 1)


def fold(match: Branches) -> tuple[np.ndarray, np.ndarray | None]:
    """(kernel, bias) of the one convolution, in float64."""
    kernels = [_widened(c, match.dilation) for c in match.convolutions]
    largest = tuple(max(k.shape[2 + a] for k in kernels) for a in range(kernels[0].ndim - 2))
    kernel = np.zeros((*kernels[0].shape[:2], *largest))
    for own in kernels:
        margin = [((big - k) // 2, (big - k) // 2) for big, k in zip(largest, own.shape[2:], strict=True)]
        kernel += np.pad(own, [(0, 0), (0, 0), *margin])
    filters = np.arange(len(kernel))
    kernel[(filters, filters % kernel.shape[1], *(k // 2 for k in largest))] += match.identities
    biases = [np.asarray(c.constant(2), np.float64) for c in match.convolutions if c.input(2) is not None]
    biases += [np.broadcast_to(v.constant.astype(np.float64).reshape(-1), kernel.shape[:1]) for v in match.offsets]
    return kernel, sum(biases[1:], biases[0]) if biases else None


def _widened(conv: Node, dilation: tuple[int, ...]) -> np.ndarray:
    """The kernel in float64, zeros between its taps where its dilation is a multiple of that asked for."""
    kernel = np.asarray(conv.constant(1), np.float64)
    wide = np.zeros((*kernel.shape[:2], *_extents(conv, dilation)))
    steps = zip(_spatial(conv), _sizes(conv, "dilations"), dilation, strict=True)
    taps = [slice(None, None, own // common if k > 1 else 1) for k, own, common in steps]
    wide[(slice(None), slice(None), *taps)] = kernel
    return wide


def rewrite_branches(facts: Facts, match: Branches) -> None:
    """Write the one convolution; the initialisers of the branches stay as they are for whoever shares them."""
    graph, first = facts.graph, match.first
    dtype = first.required(1).dtype
    assert dtype is not None
    kernel, bias = fold(match)
    stem = match.total.output.name
    weight = Value(graph.fresh_name(f"{stem}_weight"), kernel.shape, dtype, kernel.astype(dtype))
    inputs = [first.required(0), weight]
    if bias is not None:
        inputs.append(Value(graph.fresh_name(f"{stem}_bias"), bias.shape, dtype, bias.astype(dtype)))
    output = Value(graph.fresh_name(f"{stem}_folded"), match.total.output.shape, match.total.output.dtype)
    pads = [d * (k // 2) for k, d in zip(kernel.shape[2:], match.dilation, strict=True)]
    attributes = {
        **first.attributes,
        "kernel_shape": list(kernel.shape[2:]),
        "dilations": list(match.dilation),
        "pads": [*pads, *pads],
    }
    node = Node("Conv", inputs, [output], attributes, output.name)
    node.made_by = NAME
    graph.insert_before(match.total, [node])
    graph.replace_uses(match.total.output, output)


def record_branches(node: Node, found: Branches | Decline) -> Reparam:
    """The report's row."""
    if isinstance(found, Decline):
        return Reparam(len(node.inputs), "Conv", "leave", found.node, found.reason)
    kernel, bias = fold(found)
    weights = [v for c in found.convolutions for v in (c.constant(1), c.constant(2)) if v is not None]
    dtype = found.first.required(1).dtype
    size = kernel.size + (0 if bias is None else bias.size)
    error = float(np.abs(kernel - kernel.astype(dtype).astype(np.float64)).max())
    return Reparam(
        len(found.convolutions) + found.identities,
        "Conv",
        "rewrite",
        node.label,
        "convolutions of one input, summed: their kernels add around the common centre",
        sum(w.size for w in weights),
        size,
        error,
    )


fold_reparam_branches = Pass(NAME, match_branches, rewrite_branches, record_branches)
