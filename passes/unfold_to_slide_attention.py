"""Attention over a k x k neighbourhood, however its keys were gathered, as one SlideAttention.

Matches
    out[p] = sum_j softmax_j(scale * q[p] . k_j[p] + bias[p, j]) v_j[p], where k_j and v_j read the neighbour of slot j
    of the pixel p in their maps, whatever the border: by unfold, slices, gather, or a depthwise convolution; or where
    all tokens attend all under a constant mask that excludes every key but those neighbours. A convolution with learned
    filters per channel and slot (the folded deformed shifting module) is a learned shift, kept as kernels of the op.
Rewrites to
    SlideAttention(query, key, value, bias, shift kernels and their biases, paddings) on channels-first maps; K and V
    are never expanded.
Exact when
    query map o return map is the identity on the pixels; every slot of keys and of values reads
    `NeighborhoodGeometry.pixels()` for every pixel, borders included, in one common order of slots (undone in bias and
    kernels), or in an order of each pixel's own (undone in a bias per pixel); keys are left out only where the mask is
    -inf, or the lowest finite number in a row that keeps a key.
Declines when
    one of these fails, or the neighbourhood covers the whole map (global).
Source
    Slide-Transformer, https://arxiv.org/abs/2304.04237; stand-alone self-attention, https://arxiv.org/abs/1906.05909.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.functions.spec import SlideAttention
from attnrewrite.graph import STANDARD_DOMAIN, Node
from attnrewrite.localattention.attention import read_attention
from attnrewrite.localattention.geometry import by
from attnrewrite.localattention.grid import count
from attnrewrite.localattention.neighborhoods import NeighborhoodMatch, match_neighborhood
from attnrewrite.localattention.rewrite import SiteRewriter, declined_site, softmax_type
from attnrewrite.localattention.site import Decline, Site
from attnrewrite.localattention.sources import Source
from attnrewrite.localattention.symbolic import or_symbolic
from attnrewrite.pipeline import Pass

NAME = "unfold-to-slide-attention"


def match_slide_attention(facts: Facts, softmax: Node) -> NeighborhoodMatch | Decline | None:
    """The neighbourhood attention around a softmax."""
    if softmax.op != "Softmax" or softmax.domain != STANDARD_DOMAIN:
        return None
    attention = read_attention(facts, softmax)
    found = attention if isinstance(attention, Decline) else match_neighborhood(facts, attention)
    return or_symbolic(facts, softmax, found) if isinstance(found, Decline) else found


def rewrite_slide_attention(facts: Facts, match: NeighborhoodMatch) -> None:
    """Write the op in place of the site."""
    maps, attention, geometry = match.maps, match.maps.attention, match.geometry
    excluding = "exclude" in geometry.borders
    site = SiteRewriter(facts, maps, geometry.feature_size, NAME)
    channels, value_dim = attention.head_dim, count(attention.output_shape[attention.value_axis])
    query = site.operand("query", attention.query, maps.query, attention.channel_axis, channels)
    key_source, value_source = (without_padding(s) if excluding else s for s in (match.key, match.value))
    key = site.operand("key", attention.key, key_source, attention.channel_axis, channels, geometry.key_size)
    value = site.operand("value", attention.value, value_source, attention.value_axis, value_dim, geometry.key_size)
    query_map, scale, _ = site.scaled_query(query.map, channels)

    heads = maps.num_heads
    tensors = [site.hoister.laid_out(m, channels_first=True) for m in (query_map, key.map, value.map)]
    dtype = tensors[0].dtype
    assert dtype is not None
    bias = match.bias
    if bias is not None and bias.ndim == 2:
        bias = np.broadcast_to(bias, (heads, geometry.keys_per_query))
    if key.padding is not None or value.padding is not None:
        geometry = replace(geometry, border=geometry.border.replace("zero", "constant"))
    spec = SlideAttention(geometry, heads, scale, softmax_type(attention))
    site.finish(
        spec,
        [
            *tensors,
            site.constant_operand(bias, "attention_bias", attention.softmax_dtype),
            site.constant_operand(_shared(match.key_kernel, channels), "key_kernel", dtype),
            site.constant_operand(_shared(match.key_bias, channels), "key_bias", dtype),
            site.constant_operand(_shared(match.value_kernel, value_dim), "value_kernel", dtype),
            site.constant_operand(_shared(match.value_bias, value_dim), "value_bias", dtype),
            site.constant_operand(key.padding, "key_padding", dtype),
            site.constant_operand(value.padding, "value_padding", dtype),
        ],
        replace(maps, keys=(match.key,), values=(match.value,)),
        channels_first=True,
    )


def without_padding(source: Source) -> Source:
    """The source of tokens of which those outside the map are never used."""
    return replace(source, candidate=replace(source.candidate, fills=()))


def _shared(rows: np.ndarray | None, head_dim: int) -> np.ndarray | None:
    """[nH*d, ...] -> [d, ...] where all heads share their rows."""
    if rows is None:
        return None
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    return heads[0] if (heads == heads[:1]).all() else rows


def record_slide_attention(softmax: Node, found: NeighborhoodMatch | Decline) -> Site:
    """The report's row."""
    if isinstance(found, Decline):
        return declined_site(softmax, found)
    geometry, attention = found.geometry, found.maps.attention
    learned = "learned shifts, " if found.key_kernel is not None or found.value_kernel is not None else ""
    border = _border(found)
    biased = found.bias is not None or found.key_bias is not None
    return Site(
        "",
        softmax.label,
        "neighborhood",
        "rewrite",
        f"{by(geometry.kernel_size)} neighbourhood, {learned}{border} border: key and value maps equal the closed form",
        num_heads=found.maps.num_heads,
        head_dim=attention.head_dim,
        feature_size=geometry.feature_size,
        kernel_size=geometry.kernel_size,
        border=border,
        dilation=geometry.dilation,
        bias="constant" if biased else "none",
        mask="constant" if found.masked else "none",
    )


def _border(found: NeighborhoodMatch) -> str:
    """The border as the report says it: "constant" where operators or a number other than zero fill the padding."""
    fills = (*found.key.candidate.fills, *found.value.candidate.fills)
    filled = any(depth or fill.number for depth, fill in fills)
    return found.geometry.border.replace("zero", "constant") if filled else found.geometry.border


unfold_to_slide_attention = Pass(
    NAME, match_slide_attention, rewrite_slide_attention, record_slide_attention, after=("fold-reparam-branches",)
)
