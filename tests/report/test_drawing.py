"""Drawings of readings: small maps whole, large ones as excerpts, in one to three axes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from attnrewrite.localattention.site import Reading, Site
from attnrewrite.report.drawing import MAX_COLUMNS, MAX_ROWS, draw, excerpt, explained, sentence

Pixels = tuple[tuple[int, ...], ...]


def block(*ranges: range) -> Pixels:
    return tuple(itertools.product(*ranges))


def reading(query: tuple[int, ...], size: tuple[int, ...], reads: Pixels, together: Pixels | None = None) -> Reading:
    together = (query,) if together is None else together
    return Reading("keys", query, size, together, reads, size, 0, "a query in the middle")


def test_a_window_and_what_lies_around_it() -> None:
    window = block(range(3, 5), range(4, 8))
    assert draw(reading((4, 5), (16, 12), window, window)) == [
        "      3",
        " …  … … … … … … … …",
        " 2  … . . . . . . …",
        " 3  … . # # # # . …",
        " 4  … . # Q # # . …",
        " 5  … . . . . . . …",
        " …  … … … … … … … …",
        "Q the query, # read and reading the same, … left out",
    ]


def test_a_window_that_wraps_around_is_two_runs() -> None:
    window = block((7, 0), (11, 0))  # type: ignore[arg-type]
    lines = draw(reading((7, 11), (8, 12), window, window))
    assert [line[3:] for line in lines[1:-1]] == ["# . … . #", ". . … . .", "… … … … …", ". . … . .", "# . … . Q"]


def test_keys_of_another_window_are_told_from_the_own_queries() -> None:
    own, other = block(range(2), range(2)), block(range(2), range(1, 3))
    lines = draw(reading((0, 0), (2, 4), other, own))
    assert [line[3:] for line in lines[1:-1]] == ["Q # + .", "o # + ."]
    assert lines[-1].startswith("Q the query, # read and reading the same, + read, o reading the same")


def test_dilated_neighbourhood_shows_the_pixels_between() -> None:
    neighbours = block(range(0, 5, 2), range(0, 5, 2))
    lines = draw(reading((2, 2), (5, 5), neighbours))
    assert [line[3:] for line in lines[1:-1]] == ["+ . + . +", ". . . . .", "+ . Q . +", ". . . . .", "+ . + . +"]


def test_one_axis_is_one_row_and_three_are_a_slice() -> None:
    assert draw(reading((2,), (5,), block(range(1, 4)), block(range(1, 4))))[1] == "0  . # Q # ."
    cube = block(range(2, 4), range(2), range(2))
    lines = draw(reading((3, 1, 1), (4, 2, 3), cube, cube))
    assert lines[0] == "at (3) along the leading axes"
    assert lines[2:4] == ["0  # # .", "1  # Q ."]


def test_keys_of_a_map_of_other_extents_are_drawn_on_it() -> None:
    pooled = replace(reading((5, 5), (8, 8), block(range(2, 4), range(2, 4))), size=(4, 4), padding=3)
    assert [line[3:] for line in draw(pooled)[1:-1]] == [". . . .", ". . . .", ". . + +", ". . + +"]
    assert sentence(pooled) == (
        "a query in the middle: pixel (5, 5) of a 8x8 map reads the keys of 4 pixels of a 4x4 map, "
        "and 3 slots of padding"
    )


@pytest.mark.parametrize("size", [(64, 64), (3, 200), (200, 3), (1000,), (9, 40, 40)])
def test_drawings_stay_small(size: tuple[int, ...]) -> None:
    query = tuple(e // 2 for e in size)
    everything = block(*(range(e) for e in size))
    lines = draw(reading(query, size, everything, everything))
    assert len(lines) <= MAX_ROWS + 3
    assert all(len(line) <= 2 * MAX_COLUMNS + 8 for line in lines[:-1])
    assert sum(line.count("Q") for line in lines[:-1]) == 1


def test_excerpt_keeps_what_is_marked() -> None:
    assert excerpt({4, 5}, 4, 20, 16) == [None, 3, 4, 5, 6, None]
    assert excerpt({0, 9}, 0, 10, 16) == [0, 1, None, 8, 9]
    assert excerpt({1, 4}, 1, 6, 16) == [0, 1, 2, 3, 4, 5]
    assert excerpt(set(range(100)), 50, 100, 6) == [None, 49, 50, 51, 52, None]


def test_json_has_the_facts_and_the_drawing() -> None:
    shown = reading((0, 0), (2, 2), block(range(2), range(2)), block(range(2), range(2)))
    site = Site("site0", "softmax", "window", "rewrite", "2x2 windows", readings=(shown,))
    (document,) = explained(site)["readings"]
    assert document["query"] == (0, 0)
    assert document["reads"] == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert document["drawing"] == draw(shown)
    assert "readings" not in site.to_json()
