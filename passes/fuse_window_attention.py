"""Window attention, shifted or not, as one FlashWindowAttention.

Matches
    out = unpartition(softmax(scale * q k^T + terms) v), where the pixels that q, k and v of a window come from are, for
    every window and token, those of `WindowGeometry` over one feature map; in any spelling of the partition, the shift
    and the layout, with any per-token operators between the feature map and the attention and behind it.
Rewrites to
    the per-token operators on the feature map, FlashWindowAttention(query, key, value, bias, mask, paddings), and the
    per-token operators behind it on the returned map.
Exact when
    query map o return map is the identity on the pixels; the query map equals `WindowGeometry.pixels()`, key and value
    maps `key_pixels()` (the same windows; larger ones; those of a map of another size), up to one order of windows and
    one of tokens each (undone in bias and mask); the terms are constants of [nW, nH, N, M]; padded tokens hold the
    value that the operators give to the padding.
Declines when
    one of these fails, the logits or probabilities are used elsewhere, or a single window covers the map (global).
Source
    Swin Transformer, https://arxiv.org/abs/2103.14030; Flash Window Attention, https://arxiv.org/abs/2501.06480.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value
from attnrewrite.localattention.attention import Attention, read_attention
from attnrewrite.localattention.choice import chosen_at_run_time
from attnrewrite.localattention.everywhere import or_global
from attnrewrite.localattention.extra_tokens import ends_where_joined, match_with_extra_tokens
from attnrewrite.localattention.geometry import WindowGeometry, by
from attnrewrite.localattention.grid import count
from attnrewrite.localattention.head_groups import match_head_groups
from attnrewrite.localattention.maps import SiteMaps, read_padded_maps
from attnrewrite.localattention.masked_windows import match_masked_windows
from attnrewrite.localattention.rewrite import SiteRewriter, declined_site, softmax_type
from attnrewrite.localattention.rows import exclusion, query_rows
from attnrewrite.localattention.shared_query import queries_asked_again, queries_made_inside, read_window_maps
from attnrewrite.localattention.site import BiasKind, Decline, MaskKind, Site
from attnrewrite.localattention.sources import model_batch
from attnrewrite.localattention.symbolic import or_symbolic
from attnrewrite.localattention.terms import relative_table
from attnrewrite.localattention.token_rows import in_rows
from attnrewrite.localattention.windows import Seen, WindowMatch, match_windows, seen_on_map
from attnrewrite.pipeline import Declined, Pass, Pipeline

NAME = "fuse-window-attention"


def match_window_attention(facts: Facts, softmax: Node) -> WindowMatch | Decline | None:
    """The window attention around a softmax."""
    if softmax.op != "Softmax" or softmax.domain != STANDARD_DOMAIN:
        return None
    found = _match(facts, softmax)
    return or_symbolic(facts, softmax, found) if isinstance(found, Decline) else found


def _match(facts: Facts, softmax: Node) -> WindowMatch | Decline:
    attention = read_attention(facts, softmax)
    if isinstance(attention, Decline):
        return or_global(facts, softmax, attention)
    maps = read_window_maps(facts, attention)
    found = maps if isinstance(maps, Decline) else match_windows(facts, maps)
    plain = isinstance(found, WindowMatch) and (found.shared is not None or _is_made_of(facts, found))
    ends = isinstance(found, WindowMatch) and ends_where_joined(facts, attention, found.key)
    if plain and not ends and isinstance(found, WindowMatch) and found.maps.query.batch == model_batch(facts):
        return found
    by_heads = match_head_groups(facts, attention)  # heads made apart may look like windows of one head
    if isinstance(by_heads, WindowMatch):
        return by_heads
    if plain and not ends:
        return found
    extra = match_with_extra_tokens(facts, attention, lambda match: _is_made_of(facts, match))
    if isinstance(extra, WindowMatch):
        return extra
    if plain:
        return found
    padded = read_padded_maps(facts, attention)  # a grid of a padded map has no closed form on the map before it
    on_padded = None if padded is None or isinstance(padded, Decline) else match_windows(facts, padded)
    if isinstance(on_padded, WindowMatch) and _is_made_of(facts, on_padded):
        return on_padded
    rows = None if isinstance(maps, Decline) or maps.shared else in_rows(facts, maps)
    in_order_of_rows = None if rows is None else match_windows(facts, rows)
    if isinstance(in_order_of_rows, WindowMatch):
        return in_order_of_rows
    if extra is not None:
        return extra
    if isinstance(found, WindowMatch):
        return found
    masked = None if isinstance(maps, Decline) else match_masked_windows(maps)
    if masked is not None:
        return masked
    if not isinstance(maps, Decline) and found.kind == "global" and (asked := query_rows(maps)) and exclusion(asked):
        return replace(found, kind="other", foreign=True)  # what the mask leaves tells more
    if found.kind == "other":
        return by_heads or _told_apart(facts, attention, maps) or found
    return found


def _told_apart(facts: Facts, attention: Attention, maps: SiteMaps | Decline) -> Decline | None:
    """What an attention that is left does that no window attention does, where that can be said; the most telling."""
    for reason in (chosen_at_run_time, queries_made_inside):
        found = reason(facts, attention)
        if found is not None:
            return found
    return queries_asked_again(facts, attention, maps)


def _is_made_of(facts: Facts, match: WindowMatch) -> bool:
    """Whether the query is a function of the map it was traced to, also where operators with two computed operands lie
    between: the other operand may come from elsewhere (the shortcut of a block before).
    """
    maps, attention = match.maps, match.maps.attention
    if not maps.query.candidate.joins:
        return True
    site = SiteRewriter(facts, maps, match.merged.feature_size, NAME)
    try:
        site.operand("query", attention.query, maps.query, attention.channel_axis, attention.head_dim)
    except Declined:
        return False
    return True


def rewrite_window_attention(facts: Facts, match: WindowMatch) -> None:
    """Write the op in place of the site."""
    maps, attention, geometry = match.maps, match.maps.attention, match.merged
    site = SiteRewriter(facts, maps, geometry.feature_size, NAME)
    channels = attention.head_dim
    asked = maps.query if match.shared is None else match.shared
    extents = None if match.shared is None else geometry.window_size
    query = site.operand("query", attention.query, asked, attention.channel_axis, channels, extents)
    key = site.operand("key", attention.key, match.key, attention.channel_axis, channels, geometry.key_size)
    value_dim = count(attention.output_shape[attention.value_axis])
    value = site.operand("value", attention.value, match.value, attention.value_axis, value_dim, geometry.key_size)
    query_map, scale, per_head = site.scaled_query(query.map, channels)

    extra: list[Value | None] = []
    if maps.extra is not None:
        beside, more = maps.extra.beside, maps.extra
        extra = [
            site.extra_operand("extra_key", beside.key, more.key, attention.channel_axis, channels),
            site.extra_operand("extra_value", beside.value, more.value, attention.value_axis, value_dim),
        ]
        if (asking := more.asking) is not None:
            extra.append(
                site.extra_operand(
                    "extra_query",
                    asking.query,
                    asking.source,
                    attention.channel_axis,
                    channels,
                    per_head,
                )
            )

    heads = maps.num_heads
    tensors = [site.hoister.laid_out(m, channels_first=False) for m in (query_map, key.map, value.map)]
    dtype = tensors[0].dtype
    assert dtype is not None
    logits_dtype = attention.softmax_dtype
    bias = match.bias
    if bias is not None:
        bias = np.broadcast_to(bias, (bias.shape[0], heads, *bias.shape[2:]))
    relative = match.relative_position
    spec = FlashWindowAttention(
        geometry,
        heads,
        scale,
        match.mask_value,
        softmax_type(attention),
        shared_query=match.shared is not None,
        relative_scale=1.0 if relative is None else relative.scale,
        head_shifts=match.head_shifts,
    )
    site.finish(
        spec,
        [
            *tensors,
            site.constant_operand(bias, "attention_bias", logits_dtype),
            site.constant_operand(match.mask, "attention_mask", logits_dtype),
            site.constant_operand(key.padding, "key_padding", dtype),
            site.constant_operand(value.padding, "value_padding", dtype),
            site.constant_operand(relative_table(relative, per_head), "relative_position", dtype),
            site.logit_bias(match.computed, logits_dtype),
            *extra,
        ],
        replace(maps, keys=(match.key,), values=(match.value,)),
        channels_first=False,
    )


def record_window_attention(softmax: Node, found: WindowMatch | Decline) -> Site:
    """The report's row."""
    if isinstance(found, Decline):
        return declined_site(softmax, found)
    geometry, attention, seen = found.merged, found.maps.attention, seen_on_map(found)
    mask: MaskKind = "shift" if found.mask_value is not None else "none" if found.mask is None else "constant"
    same_axes = len(geometry.shift_size) == len(seen.window_size)
    bias, excluding = _constants_in_words(found.bias)
    if excluding and mask == "none":
        mask = "constant"
    if found.relative_position is not None or any(not t.is_mask for t in found.computed):
        bias = "tensor"
    if any(t.is_mask for t in found.computed):
        mask = "tensor"
    shifted = any(geometry.shift_size) and not found.head_shifts
    beside = "" if found.shared is None else ", one set of queries for all of them"
    if found.head_shifts:
        beside += f", shifted by {', '.join(map(by, found.head_shifts))} for one group of heads after the other"
    if (extra := found.maps.extra) is not None:
        count = extra.key.table.shape[1]
        beside += f", {count} token{'s' if count > 1 else ''} beside each"
        beside += "" if extra.asking is None else " asking as well"
    return Site(
        "",
        softmax.label,
        seen.kind,
        "rewrite",
        f"{_in_words(geometry, seen, shifted=shifted)}{beside}: query, key and value maps equal the closed form",
        num_heads=found.maps.num_heads,
        head_dim=attention.head_dim,
        feature_size=seen.feature_size,
        window_size=seen.window_size,
        shift_size=geometry.shift_size if same_axes else (0,) * len(seen.window_size),
        head_shifts=found.head_shifts if same_axes and found.head_shifts else None,
        key_size=None if geometry.keys is None else geometry.keys.feature_size,
        key_window_size=None if geometry.keys is None else geometry.keys.window_size,
        dilation=seen.dilation,
        bias=bias,
        mask=mask,
    )


def _constants_in_words(bias: np.ndarray | None) -> tuple[BiasKind, bool]:
    """What the op's bias is to its owner: (bias, whether it excludes keys as a mask does). A causal mask, the same in
    all windows, is added with the bias, or alone in its place.
    """
    if bias is None:
        return "none", False
    kept = np.isfinite(bias)
    return "constant" if bias[kept].any() else "none", not bool(kept.all())


def _in_words(geometry: WindowGeometry, seen: Seen, *, shifted: bool) -> str:
    nouns = {"grid": "grid", "stripe": "stripes"}
    words = f"{by(seen.window_size)} {nouns.get(seen.kind, 'windows')}"
    words += ", shifted" if shifted else ""
    if geometry.keys is None:
        return words
    keys = f"{by(geometry.keys.window_size)} windows"
    if geometry.keys.feature_size != geometry.feature_size:
        keys = f"{keys} of a {by(geometry.keys.feature_size)} map"
    return f"{words}, their keys {keys}"


fuse_window_attention = Pass(
    NAME, match_window_attention, rewrite_window_attention, record_window_attention, after=("move-partitions",)
)


def fuses_away(graph: Graph, movement: Iterable[Node], *before: Pass) -> bool:
    """Whether attentions of the graph are rewritten by this pass, behind those before it, and nothing of `movement` is
    left; edits the graph.
    """
    outcome = Pipeline([*before, fuse_window_attention]).run(graph)
    return any(s.verdict == "rewrite" for s in outcome.sites) and not set(movement) & set(graph.nodes)
