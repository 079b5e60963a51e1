"""Static charts of a trace's figures: how they came about, and acceptance by depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from pipeinfer_dask.trace.history import History
from pipeinfer_dask.trace.picture import image, metrics_html, table_html, ticks
from pipeinfer_dask.trace.tables import node_name
from pipeinfer_dask.trace.text import GROUND, INK

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 300, 120, 38, 22, 8, 18
"""Of a chart, in pixels: all of it, and the room around what is drawn."""
MOMENTS, POINTS, DEPTHS = 12, 300, 24
"""At most: of the course of time in the table, of a line, of places ahead."""
GRID, LINE, BAR = "#ddd", "#0072b2", "#009e73"


class Depth(NamedTuple):
    """Of the guesses at one distance ahead of the text, how many became text."""

    kept: int
    all: int

    @property
    def share(self) -> float:
        """The part that became text, 0 without any."""
        return self.kept / self.all if self.all else 0.0

    def __str__(self) -> str:
        return f"{self.kept} of {self.all}"


def charts_html(history: History) -> str:
    """Return the figures, how they came about, and acceptance by depth.

    Parameters
    ----------
    history : History

    Returns
    -------
    str
        HTML without scripts: images with descriptions, and the same as tables.
    """
    figures, began = history.figures, history.began
    times = [each.time - began for each in figures]
    end = times[-1] if times else 0.0
    at = [token.time - began for token in history.tokens]
    depths = by_depth(history)
    busy = figures[-1].busy if figures else (0.0,) * (history.trace.stages + 1)
    shares = [min(1.0, seconds / end) if end else 0.0 for seconds in busy]
    speed = [
        each.generated / time if time else None for each, time in zip(figures, times, strict=True)
    ]
    accepted = [each.accepted / each.drafted if each.drafted else None for each in figures]
    charts = [
        _line("Tokens a second so far", times, speed, end),
        _line("Time between tokens, ms", at[1:], [1e3 * (b - a) for a, b in pairwise(at)], end),
        _line(
            "Guesses accepted so far, %",
            times,
            [None if share is None else 100 * share for share in accepted],
            end,
        ),
        _columns(
            "Guesses that became text, by places ahead",
            [str(depth + 1) for depth in range(len(depths))],
            [depth.share for depth in depths],
            [str(depth) for depth in depths],
        ),
        _columns(
            "Share of the time that each node worked",
            ["drafter", *(str(stage) for stage in range(len(shares) - 1))],
            shares,
            [f"{share:.0%}" for share in shares],
        ),
    ]
    step = max(1, -(-len(figures) // MOMENTS))
    moments = [
        [
            f"{1e3 * times[row]:.1f} ms",
            str(figures[row].generated),
            _figure(speed[row], "{:.1f}"),
            _figure(accepted[row], "{:.0%}"),
        ]
        for row in reversed(range(len(figures) - 1, -1, -step))
    ]
    tables = [
        metrics_html(history.tally.metrics()),
        table_html(
            ["until", "tokens", "tokens a second so far", "guesses accepted so far"], moments
        ),
        table_html(
            ["places ahead", "guesses that became text"],
            [[str(at), str(depth)] for at, depth in enumerate(depths, 1)],
        ),
        table_html(
            ["node", "share of the time that it worked"],
            [[node_name(row), f"{share:.0%}"] for row, share in enumerate(shares)],
        ),
    ]
    return (
        f"<div>{_cards(history)}"
        f'<div style="display:flex;flex-wrap:wrap;gap:10px">{"".join(charts)}</div>'
        f"<details><summary>The same as tables</summary>{''.join(tables)}</details></div>"
    )


def by_depth(history: History) -> list[Depth]:
    """Return for each distance ahead of the text, from 1 on, what became of its guesses."""
    counts: dict[int, list[int]] = {}
    for guess in history.settled:
        if guess.ahead:
            count = counts.setdefault(guess.ahead, [0, 0])
            count[0] += guess.kept
            count[1] += 1
    deepest = min(max(counts, default=0), DEPTHS)
    return [Depth(*counts.get(ahead, (0, 0))) for ahead in range(1, deepest + 1)]


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _cards(history: History) -> str:
    """Return the figures that matter most, large."""
    metrics = history.tally.metrics()
    first = None if metrics.ttft_s is None else 1e3 * metrics.ttft_s
    between = None if metrics.itl_s is None else 1e3 * metrics.itl_s
    vain = metrics.layers_wasted / metrics.layers_computed if metrics.layers_computed else None
    values = [
        ("tokens a second", _figure(metrics.tokens_per_s, "{:.1f}")),
        ("to the first token", _figure(first, "{:.0f} ms")),
        ("between tokens", _figure(between, "{:.1f} ms")),
        ("guesses accepted", _figure(metrics.acceptance_rate, "{:.0%}")),
        ("computed in vain", _figure(vain, "{:.0%}")),
    ]
    style = "border:1px solid #ccc;border-radius:4px;padding:3px 10px;min-width:96px"
    cards = [
        f'<div style="{style}"><b style="display:block;font-size:18px">{value}</b>{name}</div>'
        for name, value in values
    ]
    row = "display:flex;flex-wrap:wrap;gap:6px;margin:4px 0"
    return f'<div style="{row}">{"".join(cards)}</div>'


def _line(title: str, times: Sequence[float], values: Sequence[float | None], end: float) -> str:
    """Return a value over time, as an image below its title."""
    points = [(time, value) for time, value in zip(times, values, strict=True) if value is not None]
    most = max((value for _, value in points), default=0.0) * 1.05 or 1.0
    inside = WIDTH - LEFT - RIGHT
    parts = _grid(most)
    drawn = [
        f"{LEFT + time / (end or 1.0) * inside:.1f} {_height(value, most):.1f}"
        for time, value in points[:: max(1, len(points) // POINTS)]
    ]
    if drawn:
        parts.append(f'<path d="M{"L".join(drawn)}" fill="none" stroke="{LINE}" stroke-width="2"/>')
    for time in ticks(0.0, end or 1.0, 4):
        x = LEFT + time / (end or 1.0) * inside
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{1e3 * time:g}</text>'
        )
    said = f"{title}: {points[-1][1]:.3g} at last" if points else f"{title}: nothing yet"
    return _chart(f"{title} (across: ms)", parts, said)


def _columns(title: str, names: list[str], shares: list[float], notes: list[str]) -> str:
    """Return shares as columns, as an image below its title."""
    wide = (WIDTH - LEFT) / max(1, len(names))
    parts = _grid(1.0)
    for at, (name, share) in enumerate(zip(names, shares, strict=True)):
        x, top = LEFT + at * wide, _height(share, 1.0)
        parts.append(
            f'<rect x="{x + 0.12 * wide:.1f}" y="{top:.1f}" width="{0.76 * wide:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}" fill="{BAR}"/>'
        )
        if wide > 14 or at % -(-14 // wide) == 0:
            middle = x + wide / 2
            parts.append(
                f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{name}</text>'
            )
    told = ", ".join(f"{name}: {note}" for name, note in zip(names, notes, strict=True))
    return _chart(title, parts, f"{title}: {told or 'nothing yet'}")


def _height(value: float, most: float) -> float:
    return HEIGHT - BOTTOM - min(value, most) / most * (HEIGHT - BOTTOM - TOP)


def _grid(most: float) -> list[str]:
    """Return lines at round values, each with its value."""
    return [
        f'<path d="M{LEFT} {_height(value, most):.1f}H{WIDTH}" stroke="{GRID}"/>'
        f'<text x="{LEFT - 4}" y="{_height(value, most) + 4:.1f}" text-anchor="end">'
        f"{value:.3g}</text>"
        for value in ticks(0.0, most, 3)
    ]


def _chart(title: str, parts: list[str], description: str) -> str:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11" fill="{INK}">'
        f'<rect width="100%" height="100%" fill="{GROUND}"/>{"".join(parts)}</svg>'
    )
    return f"<div><div><small>{title}</small></div>{image(svg, description)}</div>"
