"""Heads of one softmax with windows of their own: some plain, some shifted (StyleSwin).

Heads one after the other that read the same pixels are a run. Each run is an attention of its own, which must be window
attention on the same map; the windows of any two may differ by their shift alone. Then all are one op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.indexing.map import IndexingError, identity, reshape
from attnrewrite.localattention.attention import Attention, of_heads
from attnrewrite.localattention.extra_sources import joined
from attnrewrite.localattention.grid import count, row_major
from attnrewrite.localattention.maps import agreeing_returns
from attnrewrite.localattention.returns import Return, spelled_out
from attnrewrite.localattention.shared_query import read_window_maps
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.tokens import candidates, channel_axis_of, feature_axes
from attnrewrite.localattention.windows import WindowMatch, match_windows
from attnrewrite.ops import REDUCTIONS


@dataclass(frozen=True)
class _Runs:
    """Along one axis of the grid, the first head of every run. apart: that heads read different pixels, and where that
    shows; None where they are only made apart and joined.
    """

    axis: int
    extent: int
    starts: tuple[int, ...]
    apart: Decline | None = None

    def heads(self) -> list[np.ndarray]:
        """int64, the positions of each run."""
        return [np.arange(a, b) for a, b in zip(self.starts, (*self.starts[1:], self.extent), strict=True)]


def match_head_groups(facts: Facts, attention: Attention) -> WindowMatch | Decline | None:
    """The windows of all heads as one match; None where all heads read the same pixels of one map."""
    runs = _read_apart(facts, attention) or _joined_heads(facts, attention)
    if runs is None:
        return None
    several = _made_of_several(facts, attention, runs.axis)
    if several is not None:
        return several
    found = _match_runs(facts, attention, runs)
    if not isinstance(found, Decline):
        return found
    return None if runs.apart is None else Decline(f"{runs.apart.reason}{found.reason}", found.node)


def _match_runs(facts: Facts, attention: Attention, runs: _Runs) -> WindowMatch | Decline:
    """The match, or how the sentence "head a reads other pixels than head b" goes on."""
    node = attention.softmax.label if runs.apart is None else runs.apart.node
    if attention.query_terms or attention.computed_terms:
        return Decline(", and what is added to the logits is computed from data", node)
    found = []
    for heads in runs.heads():
        maps = read_window_maps(facts, of_heads(attention, runs.axis, heads))
        part = maps if isinstance(maps, Decline) else match_windows(facts, maps)
        if isinstance(part, Decline):
            which = f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]} to {heads[-1]}"
            return Decline(f"; of {which}, {part.reason}", part.node)
        found.append(part)
    merged = [m.geometry.merged() for m in found]
    if len({len(g.feature_size) for g in merged}) == 1:
        found = [replace(m, geometry=g) for m, g in zip(found, merged, strict=True)]
    different = _difference(found)
    if different is not None:
        return Decline(f": {different}", node)
    back = _common_return(facts, attention, runs, found)
    if back is None:
        return Decline(", and their outputs do not return to one map", attention.output.name)
    return _as_one(attention, runs, found, back)


def _read_apart(facts: Facts, attention: Attention) -> _Runs | None:
    """The runs of heads that read the same tokens; None where there is but one.

    An axis that merely numbers heads beside tokens differs from head to head by one distance for all tokens.
    """
    channels = frozenset({attention.channel_axis, attention.value_axis})
    ways = [
        list(candidates(o.value, o.index, attention.channel_axis, facts.positions))
        for o in (attention.query, attention.value, attention.key)
    ]
    features = next((f for w in ways if (f := feature_axes(w, channels) - {attention.key_axis}) != channels), channels)
    heads = sorted(features - channels)
    if not heads or not isinstance(attention.output_shape[heads[0]], int):
        return None
    axis = heads[0]
    starts: set[int] = set()
    seen = None
    for candidate in (c for way in ways for c in way):
        for coordinate in candidate.index:
            reads = coordinate.depends_on()
            if axis not in reads or not reads - features:
                continue
            values = np.moveaxis(coordinate.values, axis, 0)
            steps = np.diff(values.reshape(len(values), -1), axis=0)
            differs = np.flatnonzero((steps != steps[:, :1]).any(axis=1)) + 1
            if len(differs):
                starts.update(map(int, differs))
                seen = seen or candidate.value
    if seen is None:
        return None
    first = min(starts)
    apart = Decline(f"head {first} reads other pixels than head {first - 1}", seen.name)
    return _Runs(axis, count(attention.output_shape[axis]), (0, *sorted(starts)), apart)


def _made_of_several(facts: Facts, attention: Attention, heads: int) -> Decline | None:
    """The decline of keys, values or queries whose channels are those of several pixels (pixels folded into channels);
    None where every one is of one pixel. heads: the grid axis that numbers heads.
    """
    for name, operand, channel in (
        ("key", attention.key, attention.channel_axis),
        ("value", attention.value, attention.value_axis),
        ("query", attention.query, attention.channel_axis),
    ):
        for candidate in candidates(operand.value, operand.index, attention.channel_axis, facts.positions):
            node = candidate.value.producer
            mixed = None if node is None or node.op in REDUCTIONS else channel_axis_of(node)
            if mixed is None:
                continue
            tokens = [a for a in range(len(candidate.index)) if a != mixed]
            read = row_major(candidate.index, tokens, candidate.value.known_shape)
            if read.shape[channel] > 1:
                of_one = read[tuple(slice(None) if a in (heads, channel) else 0 for a in range(read.ndim))]
                reason = f"the channels of one {name} are those of {len(np.unique(of_one))} pixels"
                return Decline(f"{reason}, so the {name}s are no pixels of a map", candidate.value.name)
            break  # behind the first operator that mixes channels
    return None


def _joined_heads(facts: Facts, attention: Attention) -> _Runs | None:
    """The runs of heads that are made apart and joined, query, key and value alike; None where they are not."""
    for axis in range(1, len(attention.output_shape)):
        extent = attention.output_shape[axis]
        if axis == attention.value_axis or not isinstance(extent, int):
            continue
        for found in joined(facts, attention, attention.query, axis):
            pieces = sorted(found.pieces, key=lambda piece: int(piece[0]))
            if any((np.diff(piece) != 1).any() for piece in pieces):
                continue
            starts = tuple(int(piece[0]) for piece in pieces)
            if all(
                any(
                    starts == tuple(sorted(int(p[0]) for p in other.pieces))
                    for other in joined(facts, attention, o, axis)
                )
                for o in (attention.key, attention.value)
            ):
                return _Runs(axis, extent, starts)
    return None


def _difference(found: Sequence[WindowMatch]) -> str | None:
    """Why these are no windows of one op, which differ by their shift alone; None if they are."""
    first = found[0]
    none = (0,) * len(first.geometry.feature_size)
    plain = replace(first.geometry, shift_size=none, shift_padded=False)
    for other in found:
        if other.shared is not None or other.maps.extra is not None:
            return "they do not ask with the pixels of the map alone"
        same_axes = len(other.geometry.feature_size) == len(none)
        if not same_axes or replace(other.geometry, shift_size=none, shift_padded=False) != plain:
            return "their windows differ by more than a shift"
        if other.maps.query.batch != first.maps.query.batch:
            return "their maps have batches of their own"
    shifted = [m.geometry for m in found if any(m.geometry.shift_size) and m.geometry.is_padded]
    if len({g.shift_padded for g in shifted}) > 1:
        return "some are shifted before the map is padded, some after"
    return None


def _common_return(facts: Facts, attention: Attention, runs: _Runs, found: Sequence[WindowMatch]) -> Return | None:
    """The map that all heads return to, every pixel where its query came from, and where its numbers stand in the
    output.
    """
    returns = [{r.value: r for r in agreeing_returns(facts, m.maps) if not r.depth} for m in found]
    common = [r for value, r in returns[0].items() if all(value in others for others in returns[1:])]
    features = (*sorted({runs.axis, *(a for m in found for a in m.maps.heads)}), attention.value_axis)
    for back in sorted(common, key=lambda r: spelled_out(len(r.roles.tokens) - 1)):
        shape = back.value.known_shape
        own = identity(shape, len(shape) + 1)
        ways = candidates(back.value, own, len(shape), facts.positions)
        at_output = next((c for c in ways if c.value is attention.output and not c.depth), None)
        if at_output is None:
            continue
        try:
            index = reshape(at_output.index, attention.output.known_shape, attention.output_shape)
        except IndexingError:
            continue
        read = row_major(index, features, attention.output_shape)
        held = np.unique(read)
        if len(held) == math.prod(count(attention.output_shape[a]) for a in features):
            return replace(back, index=index)
    return None


def _as_one(attention: Attention, runs: _Runs, found: Sequence[WindowMatch], back: Return) -> WindowMatch | Decline:
    """One match of all heads; bias and mask in the order of the op's windows."""
    first, sizes = found[0], [len(heads) for heads in runs.heads()]
    heads = tuple(sorted({runs.axis, *(a for m in found for a in m.maps.heads)}))
    features = first.maps.features.union(heads, *(m.maps.features for m in found))
    group = math.gcd(*sizes)
    shifts = tuple(m.geometry.shift_size for m, size in zip(found, sizes, strict=True) for _ in range(size // group))
    per_position = math.prod(count(attention.output_shape[a]) for a in heads[1:])
    bias, mask, mask_value = _constants(found, [size * per_position for size in sizes])
    maps = replace(
        first.maps,
        attention=attention,
        features=features,
        heads=heads,
        back=back,
        groups=tuple(replace(m.maps, keys=(m.key,), values=(m.value,)) for m in found),
    )
    padded = any(m.geometry.shift_padded for m in found)
    one_shift = len(set(shifts)) == 1
    return replace(
        first,
        maps=maps,
        geometry=replace(first.geometry, shift_padded=padded),
        bias=bias,
        mask=mask,
        mask_value=mask_value,
        head_shifts=() if one_shift else shifts,
    )


Constants = tuple[np.ndarray | None, np.ndarray | None, float | None]


def _constants(found: Sequence[WindowMatch], heads: Sequence[int]) -> Constants:
    """(bias, mask, mask_value) of all heads; heads: how many each match has.

    One penalty for all shifted windows is a number. What else differs from run to run is added to the bias.
    """
    crossing = [m.geometry.crosses_regions() for m in found]
    penalties = {m.mask_value for m, crosses in zip(found, crossing, strict=True) if crosses.any()}
    mask_value = penalties.pop() if len(penalties) == 1 else None
    masks = []
    for match, crosses in zip(found, crossing, strict=True):
        mask = match.mask
        if match.mask_value is not None and mask_value is None:
            mask = np.where(crosses, match.mask_value, 0.0)
        masks.append(mask)
    shared = masks[0] is not None and all(m is not None and np.array_equal(m, masks[0]) for m in masks)
    if not shared and any(m is not None for m in masks):
        biases = [_sum(match.bias, mask) for match, mask in zip(found, masks, strict=True)]
    else:
        biases = [match.bias for match in found]
    if all(b is None for b in biases):
        return None, masks[0] if shared else None, mask_value
    geometry = found[0].geometry
    shape = (geometry.tokens_per_window, geometry.keys_per_window)
    arrays = [np.zeros((1, 1, *shape)) if b is None else b for b in biases]
    windows = max(len(a) for a in arrays)
    bias = np.concatenate(
        [np.broadcast_to(a, (windows, n, *shape)) for a, n in zip(arrays, heads, strict=True)], axis=1
    )
    return bias, masks[0] if shared else None, mask_value


def _sum(bias: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray | None:
    """bias [1 or nW, nH or 1, N, M] + mask [nW, N or 1, M]."""
    if mask is None:
        return bias
    return mask[:, None] if bias is None else bias + mask[:, None]
