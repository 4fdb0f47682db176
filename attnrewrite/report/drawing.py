"""A reading drawn in text: an excerpt of the feature map around one query, its keys marked.

rows 4-7 of 8, columns 3-9 of 12
      3
  4   .  #  #  #  #  .  .
  5   .  #  Q  #  #  .  .
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from attnrewrite.localattention.site import Reading, Site

MAX_ROWS, MAX_COLUMNS = 16, 20
QUERY, BOTH, READ, ASKS, NEITHER, GAP = "Q", "#", "+", "o", ".", "…"
LEGEND = {
    QUERY: "the query",
    BOTH: "read and reading the same",
    READ: "read",
    ASKS: "reading the same",
    NEITHER: "neither",
    GAP: "left out",
}


def sentence(reading: Reading) -> str:
    """What the drawing shows, in words."""
    count = len(reading.reads)
    text = f"{reading.note}: pixel {_point(reading.query)} of a {_by(reading.query_size)} map reads the {reading.what}"
    text += f" of {count} pixel{'' if count == 1 else 's'}"
    if reading.size != reading.query_size:
        text += f" of a {_by(reading.size)} map"
    if reading.padding:
        text += f", and {reading.padding} slot{'' if reading.padding == 1 else 's'} of padding"
    return text


def draw(reading: Reading) -> list[str]:
    """The lines of the drawing, its legend last; at most MAX_ROWS rows of MAX_COLUMNS pixels.

    Maps of more than two axes are drawn at the query's place along the leading axes (or, where nothing is read there,
    at the first place that is read). A map of one axis is one row.
    """
    same_map = reading.size == reading.query_size
    leading = len(reading.size) - 2
    place = _slice(reading, same_map) if leading > 0 else ()
    reads = _on_slice(reading.reads, place)
    together = _on_slice(reading.together, place) if same_map else set()
    query = next(iter(_on_slice([reading.query], place)), None) if same_map else None
    marked = reads | together | ({query} if query else set())
    height, width = (1, *reading.size)[-2:]
    centre = query or min(reads, default=(0, 0))
    rows = excerpt({r for r, _ in marked}, centre[0], height, MAX_ROWS)
    columns = excerpt({c for _, c in marked}, centre[1], width, MAX_COLUMNS)

    def mark(row: int | None, column: int | None) -> str:
        if row is None or column is None:
            return GAP
        point = (row, column)
        if point == query:
            return QUERY
        if point in reads:
            return BOTH if point in together else READ
        return ASKS if point in together else NEITHER

    label = len(str(height))
    grid = [[mark(row, column) for column in columns] for row in rows]
    lines = [f"at {_point(place)} along the leading axes"] if place else []
    lines.append(f"{'':{label}}  {_header(columns)}")
    for row, marks in zip(rows, grid, strict=True):
        lines.append(f"{GAP if row is None else row:>{label}}  {' '.join(marks)}")
    used = {m for marks in grid for m in marks}
    lines.append(", ".join(f"{m} {meaning}" for m, meaning in LEGEND.items() if m in used and m != NEITHER))
    return lines


def _header(columns: Sequence[int | None]) -> str:
    """The number of the first column of each run, above it."""
    text = ""
    for at, column in enumerate(columns):
        if column is not None and (at == 0 or columns[at - 1] is None) and len(text) <= 2 * at:
            text = f"{text:{2 * at}}{column} "
    return text.rstrip()


def explained(site: Site) -> dict[str, Any]:
    """A site and its readings as the JSON of `explain` has them, each with its drawing."""
    document = site.to_json()
    if site.readings:
        document["readings"] = [
            {**asdict(reading), "sentence": sentence(reading), "drawing": draw(reading)} for reading in site.readings
        ]
    return document


def excerpt(marked: Iterable[int], centre: int, extent: int, limit: int) -> list[int | None]:
    """Positions of an axis to draw, ascending: those marked and one more on each side; None stands for a gap.

    Where they are more than limit allows, those nearest to the centre stay.
    """
    near = {p for m in {*marked, centre} for p in (m - 1, m, m + 1) if 0 <= p < extent}
    while True:
        shown: list[int | None] = []
        for position in sorted(near):
            previous = shown[-1] if shown else -1
            if previous is not None and position - previous == 2:
                shown.append(position - 1)  # a gap of one is as long as the pixel itself
            elif previous is not None and position - previous > 2:
                shown.append(None)
            shown.append(position)
        if shown and shown[-1] != extent - 1:
            shown.append(None)
        if len(shown) <= limit:
            return shown
        near.remove(max(near, key=lambda p: abs(p - centre)))


def _slice(reading: Reading, same_map: bool) -> tuple[int, ...]:
    leading = len(reading.size) - 2
    read = {p[:leading] for p in reading.reads}
    own = reading.query[:leading] if same_map else None
    return own if own is not None and (own in read or not read) else min(read)


def _on_slice(points: Sequence[tuple[int, ...]], place: tuple[int, ...]) -> set[tuple[int, int]]:
    return {((0, *p) if len(p) == 1 else p)[-2:] for p in points if p[: len(place)] == place}  # type: ignore[misc]


def _point(point: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, point))})"


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
