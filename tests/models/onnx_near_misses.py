"""Models that look like local attention and are not the function that a careless matcher takes them for.

    near_miss = NEAR_MISSES["window-rolled-back-the-wrong-way"]
    near_miss.model()       # onnx.ModelProto
    near_miss.wrong         # what is wrong with it, in words
    near_miss.looks_like    # the spelling it was made from

Each differs from its spelling in one place. Where `same_output` is true the output y is still that of the spelling, but
something inside has another reader. A near miss must be left alone, with a reason.

UNUSUAL holds models of the same make that are local attention all the same, only not the one they look like: what is
rewritten must be what they do compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx

from attnrewrite.localattention.geometry import NeighborhoodGeometry, WindowGeometry
from tests.models import onnx_movement as movement
from tests.models import onnx_neighborhoods as neighborhoods
from tests.models import onnx_parts as parts
from tests.models.onnx_borders import BorderSpelling, DenseSpelling
from tests.models.onnx_builder import Builder
from tests.models.onnx_halos import HALO_NEAR_MISSES
from tests.models.onnx_movement import Movement
from tests.models.onnx_neighborhoods import K3, NeighborhoodSpelling
from tests.models.onnx_spellings import BORDER_SPELLINGS, FOLDED, NEIGHBORHOOD, UNSHIFTED, WINDOW, Spelling
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, PLAIN, SHIFTED, Triple, WindowSpelling


@dataclass(frozen=True)
class NearMiss:
    """A model, what is wrong with it, and the spelling it would be taken for."""

    model: Callable[[], onnx.ModelProto]
    wrong: str
    looks_like: Spelling
    same_output: bool = False


def _window(wrong: str, **changes: object) -> NearMiss:
    return NearMiss(replace(WINDOW, **changes).model, wrong, WINDOW)  # type: ignore[arg-type]


def _unshifted(wrong: str, **changes: object) -> NearMiss:
    return NearMiss(replace(UNSHIFTED, **changes).model, wrong, UNSHIFTED)  # type: ignore[arg-type]


def _moved(wrong: str, of: WindowSpelling = WINDOW, **changes: object) -> NearMiss:
    changed = replace(of, movement=Movement(**changes))  # type: ignore[arg-type]
    return NearMiss(changed.model, wrong, of)


# Window attention: movement.


def merge_other_window(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    """Merged as windows of 2 x 8: as many tokens, other pixels."""
    return movement.merge_by_reshape(g, tokens, WindowGeometry(geometry.feature_size, (8, 2), (0, 0)), channels)


def merge_columns_first(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    """The windows are put back column by column."""
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(tokens, -1, columns, rows, height, width, channels), 0, 2, 3, 1, 4, 5)
    return g.reshape(x, -1, *geometry.padded_size, channels)


def merge_transposed_window(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    """Every window comes back with rows and columns exchanged."""
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(tokens, -1, rows, columns, height, width, channels), 0, 1, 4, 2, 3, 5)
    return g.reshape(x, -1, *geometry.padded_size, channels)


def merge_as_grid(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    """Windows in, a dilated grid out."""
    (rows, columns), (height, width) = geometry.grid, geometry.window_size
    x = g.transpose(g.reshape(tokens, -1, rows, columns, height, width, channels), 0, 3, 1, 4, 2, 5)
    return g.reshape(x, -1, *geometry.padded_size, channels)


def merge_mirrored(g: Builder, tokens: str, geometry: WindowGeometry, channels: int) -> str:
    x = movement.merge_by_reshape(g, tokens, geometry, channels)
    return g.slice(x, -1, -(2**31), 2, step=-1)


def folded(wrong: str, **options: object) -> NearMiss:
    """The windows put back by Col2Im, but not where they came from."""
    merge = functools.partial(movement.nchw_merge_by_fold, **options)  # type: ignore[arg-type]
    of = replace(WINDOW, movement=FOLDED, opset=18)
    return NearMiss(replace(of, movement=replace(FOLDED, merge=merge)).model, wrong, of)


def roll_off_by_one(g: Builder, x: str, shifts: object, axes: object, sizes: object) -> str:
    """Forward by 2; back by the 3 that a slice bound off by one gives."""
    forward = tuple(shifts) == (2, 2)  # type: ignore[arg-type]
    return movement.roll_by_slices(g, x, (2, 2) if forward else (-3, -3), (1, 2), (8, 12))


def roll_dropping_a_column(g: Builder, x: str, shifts: object, axes: object, sizes: object) -> str:
    """x[2:] ++ x[1:3] along the columns: as long as the roll, but column 2 twice and column 0 never."""
    if tuple(shifts) != (2, 2):  # type: ignore[arg-type]
        return movement.roll_by_slices(g, x, (-2, -2), (1, 2), (8, 12))
    x = movement.roll_by_slices(g, x, (2, 0), (1, 2), (8, 12))
    return g.concat([g.slice(x, 2, 12, 2), g.slice(x, 1, 3, 2)], 2)


def windows_of_several_maps(query: WindowGeometry, key: WindowGeometry, value: WindowGeometry) -> onnx.ModelProto:
    """Query, key and value tokens each cut out with a geometry of its own; merged like the query."""
    g, weights = Builder(), WINDOW.weights
    x = g.input("x", WINDOW.shape(2))
    triple = []
    for i, geometry in enumerate((query, key, value)):
        tokens = g.linear(WINDOW.movement.enter(g, x, geometry, CHANNELS), *weights.part(i))
        triple.append(g.transpose(g.reshape(tokens, -1, 16, HEADS, HEAD_DIM), 0, 2, 1, 3))
    attended = replace(WINDOW, geometry=query, mask=None).attend(g, *triple)
    tokens = g.linear(attended, weights.proj, weights.proj_bias)
    return g.model({"y": g.op("Add", x, WINDOW.movement.leave(g, tokens, query, CHANNELS))})


def _of_maps(wrong: str, query: WindowGeometry, key: WindowGeometry, value: WindowGeometry) -> NearMiss:
    looks_like = replace(WINDOW, geometry=query, mask=None)
    return NearMiss(lambda: windows_of_several_maps(query, key, value), wrong, looks_like)


# Window attention: the tokens' arithmetic.


def _heads_then(change: Callable[[Builder, str, str, str], Triple]) -> Callable[[Builder, WindowSpelling, str], Triple]:
    def write(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
        return change(g, *parts.heads_by_gather(g, spelling, tokens))

    return write


@_heads_then
def value_heads_rotated(g: Builder, q: str, k: str, v: str) -> Triple:
    return q, k, movement.roll_by_slices(g, v, (1,), (1,), (HEADS,))


@_heads_then
def value_tokens_rotated(g: Builder, q: str, k: str, v: str) -> Triple:
    return q, k, movement.roll_by_slices(g, v, (1,), (2,), (16,))


@_heads_then
def query_tokens_rotated(g: Builder, q: str, k: str, v: str) -> Triple:
    return movement.roll_by_slices(g, q, (1,), (2,), (16,)), k, v


@_heads_then
def keys_of_the_next_window(g: Builder, q: str, k: str, v: str) -> Triple:
    """Groups are 2 samples of 6 windows; the last window of a sample reads the next sample."""
    return q, *(movement.roll_by_slices(g, x, (1,), (0,), (12,)) for x in (k, v))  # type: ignore[return-value]


@_heads_then
def one_window_reordered(g: Builder, q: str, k: str, v: str) -> Triple:
    """The keys of the first group alone are reversed."""
    first = g.slice(g.slice(k, 0, 1, 0), -1, -(2**31), 2, step=-1)
    return q, g.concat([first, g.slice(k, 1, 12, 0)], 0), v


def heads_mixed_with_tokens(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
    """The transpose before the heads is missing: reshape alone makes `[G, nH, N, d]` of `[G, N, C]`."""
    triple = (g.linear(tokens, *spelling.weights.part(i)) for i in range(3))
    q, k, v = (g.reshape(part, -1, HEADS, 16, HEAD_DIM) for part in triple)
    return q, k, v


def softmax_over_queries(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    return g.op("Softmax", logits, axis=2)


def softmax_over_heads(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    return g.op("Softmax", logits, axis=1)


def softmax_over_queries_and_keys(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Before opset 13 Softmax flattens all axes from `axis` on."""
    return g.op("Softmax", logits, axis=2)


def softmax_then_mask(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """Some probabilities are set to zero after the softmax, so the rows no longer sum to one."""
    kept = np.random.default_rng(4).random((1, 1, 16, 16)) > 0.2
    return g.mul(parts.softmax_last(g, logits, spelling), kept.astype(np.float64))


def softmax_doubled(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """softmax(softmax(logits))."""
    return parts.softmax_last(g, parts.softmax_last(g, logits, spelling), spelling)


def logits_capped(g: Builder, q: str, k: str, scale: float) -> str:
    """2 tanh(logits / 2)."""
    return g.mul(g.op("Tanh", g.mul(parts.logits_scaled(g, q, k, scale), 0.5)), 2.0)


def logits_over_part_of_the_channels(g: Builder, q: str, k: str, scale: float) -> str:
    return parts.logits_scaled(g, g.slice(q, 0, 4, 3), g.slice(k, 0, 4, 3), scale)


def logits_of_tokens_scaled_apart(g: Builder, q: str, k: str, scale: float) -> str:
    """The scale depends on the token's place in its window."""
    return parts.logits_scaled(g, g.mul(q, np.linspace(0.5, 2.0, 16)[:, None]), k, scale)


def logits_scaled_apart(g: Builder, q: str, k: str, scale: float) -> str:
    """The logits of every query have their own scale, behind the product."""
    logits = parts.logits_scaled(g, q, k, scale)
    return g.mul(logits, np.linspace(0.5, 2.0, 16)[:, None])


def mask_for_other_order(g: Builder, logits: str, spelling: WindowSpelling) -> str:
    """The groups are samples of windows; the mask is laid out as if they were windows of samples."""
    assert spelling.added_mask is not None
    return g.add(logits, np.repeat(spelling.added_mask, 2, axis=0)[:, None])


def second_reader(what: str) -> onnx.ModelProto:
    """The shifted spelling, with the logits, the probabilities or the query windows returned as a second output."""
    model = WINDOW.model()
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    name, shape = {
        "logits": (softmax.input[0], [12, HEADS, 16, 16]),
        "probabilities": (softmax.output[0], [12, HEADS, 16, 16]),
    }[what]
    model.graph.node.append(onnx.helper.make_node("Identity", [name], [what], name=f"output_{what}"))
    model.graph.output.append(onnx.helper.make_tensor_value_info(what, onnx.TensorProto.FLOAT, shape))
    onnx.checker.check_model(model)
    return model


# Neighbourhood attention.


def _near(wrong: str, of: NeighborhoodSpelling = NEIGHBORHOOD, **changes: object) -> NearMiss:
    return NearMiss(replace(of, **changes).model, wrong, of)  # type: ignore[arg-type]


def _sliced(
    starts: Callable[[int, int], tuple[int, int]], mode: str = "constant", value: float = 0.0
) -> Callable[..., str]:
    """Gathering by slices whose tap (i, j) begins at `starts(i, j)`."""

    def write(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
        height, width = geometry.feature_size
        border = [0, 0, *neighborhoods.reach(geometry)]
        x = g.pad(x, border, border, value, mode)
        shifted = []
        for i, j in (starts(*tap) for tap in neighborhoods.taps(geometry)):
            shifted.append(g.unsqueeze(g.slice(g.slice(x, i, i + height, 2), j, j + width, 3), 2))
        return g.concat(shifted, 2)

    return write


def channels_exchanged(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """The `[C, K]` axes of the stack read as `[K, C]`."""
    stacked = g.reshape(neighborhoods.by_slices(g, x, geometry), -1, geometry.keys_per_query, CHANNELS, 7, 11)
    return g.transpose(stacked, 0, 2, 1, 3, 4)


def key_and_value_gathered_apart(
    key: NeighborhoodGeometry | Callable[..., str], value: NeighborhoodGeometry | Callable[..., str]
) -> Callable[[], onnx.ModelProto]:
    """The spelling by slices with another geometry or gathering for the key and for the value."""

    @dataclass(frozen=True)
    class Apart(NeighborhoodSpelling):
        def gather(self, g: Builder, x: str, index: int) -> str:
            how = key if index == 1 else value
            if isinstance(how, NeighborhoodGeometry):
                return neighborhoods.by_slices(g, x, how)
            return how(g, x, self.geometry)

    return Apart().model


def attend_over_pixels(g: Builder, q: str, k: str, v: str, spelling: NeighborhoodSpelling) -> str:
    logits = g.reduce_sum(g.op("Mul", g.unsqueeze(q, 3), k), 2)
    weights = g.op("Softmax", logits, axis=3)
    return g.reduce_sum(g.op("Mul", g.unsqueeze(weights, 2), v), 3)


def attend_over_channels(g: Builder, q: str, k: str, v: str, spelling: NeighborhoodSpelling) -> str:
    """Softmax over the products of each channel: no dot product."""
    weights = g.op("Softmax", g.op("Mul", g.unsqueeze(q, 3), k), axis=3)
    return g.reduce_sum(g.op("Mul", weights, v), 3)


def attend_with_other_heads(g: Builder, q: str, k: str, v: str, spelling: NeighborhoodSpelling) -> str:
    return neighborhoods.attend_by_sums(g, q, k, movement.roll_by_slices(g, v, (1,), (1,), (HEADS,)), spelling)


EXCLUDED = BORDER_SPELLINGS["excluded"]
DENSE = BORDER_SPELLINGS["dense-neighbourhood"]
assert isinstance(EXCLUDED, BorderSpelling)
assert isinstance(DENSE, DenseSpelling)


class _ExcludedOneTooMany(BorderSpelling):
    @property
    def outside(self) -> np.ndarray:
        outside = super().outside.copy()
        outside[4, 38] = True
        return outside


def _one_entry_moved(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.copy()
    pixels[40, 8] = 70
    return pixels


DILATED = NeighborhoodGeometry((7, 11), (3, 3), (2, 2))

NEAR_MISSES: dict[str, NearMiss] = {
    "window-rolled-back-the-wrong-way": _moved("the map is rolled forward a second time", back=(1, 1)),
    "window-rolled-back-on-one-axis": _moved("the columns are never rolled back", back=(-1, 0)),
    "window-not-rolled-back": _moved("the map is never rolled back", back=(0, 0)),
    "window-roll-off-by-one": _moved("rolled by 2 and back by 3", roll=roll_off_by_one),
    "window-roll-with-a-column-twice": _moved(
        "a slice of the roll begins one column late", roll=roll_dropping_a_column
    ),
    "window-merged-as-other-windows": _moved("windows of 4 x 4 merged as 8 x 2", merge=merge_other_window),
    "window-merged-columns-first": _moved(
        "the grid of windows is transposed on the way back", merge=merge_columns_first
    ),
    "window-merged-transposed": _moved("tokens come back with row and column exchanged", merge=merge_transposed_window),
    "window-merged-as-grid": _moved("windows on the way in, a grid on the way out", merge=merge_as_grid),
    "window-folded-transposed": folded("every window comes back with rows and columns exchanged", place=(1, 0)),
    "window-folded-interleaved": folded(
        "windows on the way in, a grid on the way out", strides=[1, 1], dilations=[2, 3]
    ),
    "window-folded-overlapping": folded("windows are put back three pixels apart and added up", strides=[3, 3]),
    "window-merged-mirrored": _moved("the map comes back mirrored", merge=merge_mirrored),
    "window-keys-shifted-otherwise": _of_maps("keys come from unshifted windows", SHIFTED, PLAIN, SHIFTED),
    "window-values-shifted-otherwise": _of_maps("values come from unshifted windows", SHIFTED, SHIFTED, PLAIN),
    "window-keys-and-values-shifted-otherwise": _of_maps(
        "keys and values come from windows shifted against the query's", PLAIN, SHIFTED, SHIFTED
    ),
    "window-value-tokens-rotated": _window("values in another token order than keys", heads=value_tokens_rotated),
    "window-query-tokens-rotated": _window("queries in another token order than outputs", heads=query_tokens_rotated),
    "window-keys-of-the-next-window": _window("keys and values of the next window", heads=keys_of_the_next_window),
    "window-one-window-reordered": _window("the first window's keys are reversed", heads=one_window_reordered),
    "window-heads-mixed-with-tokens": _unshifted(
        "no transpose between tokens and heads", heads=heads_mixed_with_tokens
    ),
    "window-softmax-over-queries": _window("softmax over the query axis", softmax=softmax_over_queries),
    "window-softmax-over-heads": _window("softmax over the heads", softmax=softmax_over_heads),
    "window-softmax-over-two-axes": _window(
        "Softmax of opset 12 with axis 2 normalises over queries and keys",
        softmax=softmax_over_queries_and_keys,
        opset=12,
    ),
    "window-probabilities-masked": _window("probabilities set to zero after the softmax", softmax=softmax_then_mask),
    "window-softmax-twice": _window("a softmax of a softmax", softmax=softmax_doubled),
    "window-logits-capped": _unshifted("tanh of the logits", logits=logits_capped),
    "window-logits-scaled-by-token": _unshifted("every query's logits have a scale", logits=logits_scaled_apart),
    "window-mask-in-other-order": _window("the mask's windows are not those of the logits", mask=mask_for_other_order),
    "window-padded-by-reflection": NearMiss(
        replace(
            WINDOW, geometry=WindowGeometry((7, 10), (4, 4), (2, 2), True), movement=Movement(pad_mode="reflect")
        ).model,
        "padded tokens are mirrored pixels, not one value",
        replace(WINDOW, geometry=WindowGeometry((7, 10), (4, 4), (2, 2), True)),
    ),
    "window-logits-read-twice": NearMiss(
        lambda: second_reader("logits"), "the logits are also an output", WINDOW, same_output=True
    ),
    "window-probabilities-read-twice": NearMiss(
        lambda: second_reader("probabilities"), "the probabilities are also an output", WINDOW, same_output=True
    ),
    "neighborhood-one-tap-off": _near(
        "the last tap of nine reads one column to the left",
        gathering=_sliced(lambda i, j: (i, j - 1) if (i, j) == (2, 2) else (i, j)),
    ),
    "neighborhood-a-tap-twice": _near(
        "the centre stands in place of the first tap", gathering=_sliced(lambda i, j: (1, 1) if i + j == 0 else (i, j))
    ),
    "neighborhood-channels-exchanged": _near("channels and neighbours exchanged", gathering=channels_exchanged),
    "neighborhood-values-dilated": NearMiss(
        key_and_value_gathered_apart(K3, DILATED),
        "the values' neighbourhood is dilated, the keys' is not",
        NEIGHBORHOOD,
    ),
    "neighborhood-value-taps-transposed": NearMiss(
        key_and_value_gathered_apart(K3, _sliced(lambda i, j: (j, i))),
        "the values' neighbours run column by column",
        NEIGHBORHOOD,
    ),
    "neighborhood-value-border-replicated": NearMiss(
        key_and_value_gathered_apart(K3, _sliced(lambda i, j: (i, j), mode="edge")),
        "the values' border repeats the edge, the keys' is zero",
        NEIGHBORHOOD,
    ),
    "dense-one-wrong-entry": NearMiss(
        replace(DENSE, pixels=_one_entry_moved(DENSE.pixels)).model,
        "one token attends a token far away in place of a neighbour",
        DENSE,
    ),
    "dense-penalised": NearMiss(
        replace(DENSE, mask="-100").model, "a mask of -100 excludes nothing", DENSE, same_output=True
    ),
    "dense-keys-alike": NearMiss(
        replace(DENSE, pixels=np.tile(np.arange(20), (DENSE.tokens, 1))).model,
        "a constant mask leaves the same tokens to all",
        DENSE,
    ),
    "dense-causal": NearMiss(
        replace(DENSE, pixels=NeighborhoodGeometry((77,), (77,), (1,), offset=(-76,)).pixels()).model,
        "all tokens before it, however many",
        DENSE,
    ),
    "neighborhood-softmax-over-pixels": _near("softmax over the pixels", attention=attend_over_pixels),
    "neighborhood-softmax-per-channel": _near("no sum over the channels", attention=attend_over_channels),
    "neighborhood-softmax-over-two-axes": _near(
        "Softmax of opset 11 with axis 2 of 4 normalises over neighbours and pixels", opset=11
    ),
}

NEAR_MISSES |= {name: NearMiss(s.model, wrong, like) for name, (s, wrong, like) in HALO_NEAR_MISSES.items()}

UNUSUAL: dict[str, NearMiss] = {
    "window-value-heads-rotated": _window("values of head h+1 under the weights of head h", heads=value_heads_rotated),
    "window-logits-over-four-channels": _unshifted(
        "the logits sum over 4 of 5 channels", logits=logits_over_part_of_the_channels
    ),
    "window-scale-by-token": _unshifted("every token has its own scale", logits=logits_of_tokens_scaled_apart),
    "neighborhood-value-heads-rotated": _near(
        "values of head h+1 under the weights of head h", attention=attend_with_other_heads
    ),
    "neighborhood-excluded-one-too-many": NearMiss(
        _ExcludedOneTooMany(geometry=EXCLUDED.geometry, gathering=EXCLUDED.gathering, mask="add").model,
        "the mask excludes a pixel inside the map as well",
        EXCLUDED,
    ),
}
