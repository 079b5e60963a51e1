"""Static pictures of a trace, as HTML that needs neither scripts nor the network.

What a page can't run live is shown by these: an exported notebook, or one on a web site. All
text of a model is escaped, and a picture is an image, so nothing of it can act.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from pipeinfer_dask.trace.history import History
from pipeinfer_dask.trace.metrics import Metrics, figure
from pipeinfer_dask.trace.parts import Fate, Run
from pipeinfer_dask.trace.record import Trace
from pipeinfer_dask.trace.tables import Work, legible, node_name, row_names, window, work_until
from pipeinfer_dask.trace.text import text_html

WIDTH, GUTTER, ROW, HEAD = 940, 64, 22, 18
"""Of a timeline, in pixels: all of it, its row names, a row, and the space above."""
MARGIN = 20
"""To the right of its end, in pixels: the last mark may have a number."""
DIGIT = 6
"""Width of a figure in a label, in pixels."""
COLUMNS = 110
"""Of `window`: so much of a longer record is shown."""
NARROW = 3
"""Widest bar, in pixels, in which a pattern can't be told from another: it has bands instead."""


HATCHES = {
    "dots": "dotted",
    "plain": "plain",
    "underline": "underlined",
    "stripes": "striped",
    "crosses": "crossed",
    "outline": "pale",
    "hollow": "hollow, dashed",
    "ring": "ring, nothing computed",
}
"""What the patterns of bars are called, for whom colours tell nothing."""


class Look(NamedTuple):
    """How bars of a kind are drawn: a colour, a pattern besides it, and what it means."""

    colour: str
    pattern: str
    meaning: str

    @property
    def legend(self) -> str:
        """The pattern in words, and what it means."""
        return f"{HATCHES[self.pattern]}: {self.meaning}"


# Colours that can be told apart with any eyes (Okabe and Ito's), and patterns without any.
LOOKS = {
    "prefill": Look("#7f7f7f", "dots", Fate.PREFILL.meaning),
    "single": Look("#0072b2", "plain", Fate.SINGLE.meaning),
    "accepted": Look("#009e73", "underline", Fate.ACCEPTED.meaning),
    "rejected": Look("#e69f00", "stripes", Fate.REJECTED.meaning),
    "cancelled": Look("#d55e00", "crosses", Fate.CANCELLED.meaning),
    "saved": Look("#d55e00", "ring", Fate.SAVED.meaning),
    "draft": Look("#cc79a7", "outline", "drafting"),
    "open": Look("#767676", "hollow", "still open"),
}
RING = "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0"
"""A path from its middle, for what took no time."""

INKS = {
    "plain": 'fill="#fff"',
    "patterned": 'fill="#111" stroke="#fff" stroke-width="3" paint-order="stroke"',
}
"""What labels are written with, on either ground."""

# The underline's tile is a row of a timeline, in its place: each bar has one line.
PATTERNS = """<defs>
<pattern id="dots" width="4" height="4" patternUnits="userSpaceOnUse">
<rect width="4" height="4" fill="#7f7f7f"/><circle cx="2" cy="2" r="1" fill="#fff"/></pattern>
<pattern id="stripes" width="5" height="5" patternUnits="userSpaceOnUse">
<rect width="5" height="5" fill="#e69f00"/><path d="M0 5L5 0" stroke="#fff"/></pattern>
<pattern id="underline" y="18" width="8" height="22" patternUnits="userSpaceOnUse">
<rect width="8" height="22" fill="#009e73"/><rect y="16" width="8" height="2" fill="#fff"/>
</pattern>
<pattern id="crosses" width="6" height="6" patternUnits="userSpaceOnUse">
<rect width="6" height="6" fill="#fff"/><path d="M0 0L6 6M0 6L6 0" stroke="#d55e00"/></pattern>
<pattern id="narrow-dots" width="4" height="4" patternUnits="userSpaceOnUse">
<rect width="4" height="4" fill="#fff"/><rect width="4" height="3" fill="#7f7f7f"/></pattern>
<pattern id="narrow-stripes" width="4" height="4" patternUnits="userSpaceOnUse">
<rect width="4" height="4" fill="#fff"/><rect width="4" height="2" fill="#e69f00"/></pattern>
<pattern id="narrow-crosses" width="4" height="4" patternUnits="userSpaceOnUse">
<rect width="4" height="4" fill="#fff"/><rect width="4" height="1" fill="#d55e00"/></pattern>
</defs>"""


def look_of(work: Work, moment: float = math.inf) -> str:
    """Return which of `LOOKS` work has at a moment: nothing tells then what is decided later."""
    if not isinstance(work.of, Run):
        return "draft"
    open_then = moment < math.inf and work.open_at(moment)
    return "open" if open_then or work.fate is None else str(work.fate)


def timeline_svg(
    history: History, part: tuple[float, float] | None = None, moment: float = math.inf
) -> str:
    """Return who worked on what, and when, as an SVG image.

    Parameters
    ----------
    history : History
    part : (float, float), seconds, optional
        What to show; by default all. A part that ends later leaves room.
    moment : float, seconds
        What came later is not shown, nor what a run came to that was open then.
    """
    began, ended = part if part is not None else (history.began, history.ended)
    names = row_names(history.trace)
    rows, gutter = len(names), max(GUTTER, DIGIT * max(map(len, names)) + 10)
    scale = (WIDTH - gutter - MARGIN) / max(ended - began, 1e-12)
    bottom = HEAD + rows * ROW

    def x(time: float) -> float:
        return round(gutter + (min(max(time, began), ended) - began) * scale, 1)

    paths: dict[tuple[str, bool], list[str]] = {}
    labels: dict[str, list[str]] = {"plain": [], "patterned": []}
    saved: list[str] = []
    for work in work_until(history, moment):
        name, row, span = look_of(work, moment), work.row, work.span
        if name == Fate.SAVED:
            if began <= span.began <= ended:
                saved.append(f"M{x(span.began):g} {HEAD + row * ROW + ROW // 2}{RING}")
        elif span.ended > began and span.began < ended and span.ended > span.began:
            left = x(span.began)
            wide = max(1.0, round(x(span.ended) - left, 1))
            top = HEAD + row * ROW + 3
            shapes = paths.setdefault((name, wide <= NARROW), [])
            shapes.append(f"M{left:g} {top}h{wide:g}v{ROW - 6}h-{wide:g}z")
            if isinstance(work.of, Run) and wide >= DIGIT * len(str(work.of.id)) + 4:
                middle = round(left + wide / 2, 1)
                solid = LOOKS[name].pattern in ("plain", "underline")
                label = f'<text x="{middle:g}" y="{top + 12}">{work.of.id}</text>'
                labels["plain" if solid else "patterned"].append(label)
    told = _part_told(history, began, ended)
    high = bottom + (34 if told else 20)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{high}" '
        f'viewBox="0 0 {WIDTH} {high}" font-family="sans-serif" font-size="11">',
        PATTERNS,
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for row in range(rows):
        middle = HEAD + row * ROW + ROW // 2
        parts.append(
            f'<text x="4" y="{middle + 4}" fill="#222">{escape(names[row])}</text>'
            f'<path d="M{gutter} {middle}H{WIDTH - MARGIN}" stroke="#ddd"/>'
        )
    for (name, narrow), shapes in paths.items():
        parts.append(f'<path d="{"".join(shapes)}" {_paint(LOOKS[name], narrow=narrow)}/>')
    if saved:
        parts.append(f'<path d="{"".join(dict.fromkeys(saved))}" {_paint(LOOKS["saved"])}/>')
    for ground, texts in labels.items():
        if texts:
            parts.append(f'<g text-anchor="middle" {INKS[ground]}>{"".join(texts)}</g>')
    last = min(ended, moment)
    waves = [wave.time for wave in history.waves if began <= wave.time <= last]
    if waves:
        lines = "".join(f"M{x(time):g} {HEAD}V{bottom}" for time in waves)
        parts.append(f'<path d="{lines}" stroke="#d55e00" stroke-dasharray="3 3" opacity=".6"/>')
    commits = Counter(token.time for token in history.tokens if began <= token.time <= last)
    marks = "".join(f"M{x(time):g} {HEAD - 2}l-3 -7h6z" for time in commits)
    parts.append(f'<path d="{marks}" fill="#222"/>')
    later = [*(x(time) for time in commits), math.inf][1:]
    parts += [
        f'<text x="{x(time) + 5:g}" y="{HEAD - 3}" font-size="9" fill="#222">{count}</text>'
        for (time, count), next_mark in zip(commits.items(), later, strict=False)
        if count > 1 and next_mark - x(time) >= DIGIT * len(str(count)) + 8
    ]
    for moment in ticks(began - history.began, ended - history.began):
        where, label = x(moment + history.began), f"{moment * 1e3:g} ms"
        middle = min(where, WIDTH - DIGIT * len(label) / 2 - 2)  # the last one is not cut
        parts.append(
            f'<path d="M{where:g} {bottom}v4" stroke="#222"/><text x="{middle:g}" '
            f'y="{bottom + 15}" fill="#222" text-anchor="middle">{label}</text>'
        )
    if told:
        parts.append(f'<text x="{GUTTER}" y="{bottom + 29}" fill="#222">Shown: {told}</text>')
    if began <= moment <= ended:
        parts.append(f'<path d="M{x(moment):g} 0V{bottom}" stroke="#222" stroke-width="2"/>')
    return "".join([*parts, "</svg>"])


def _part_told(history: History, began: float, ended: float) -> str:
    """Return which part a picture shows, in words; nothing where that is all."""
    first, last, all_of_it = (
        f"{1e3 * max(0.0, time - history.began):.0f}" for time in (began, ended, history.ended)
    )
    from_begin, to_end = began <= history.began, ended >= history.ended - 1e-9
    if from_begin and to_end:
        return ""
    if to_end:
        return f"from {first} ms to the end at {all_of_it} ms"
    if from_begin:
        return f"the first {last} of {all_of_it} ms"
    return f"{first} to {last} of {all_of_it} ms"


def image(svg: str, description: str, style: str = "max-width:100%") -> str:
    """Return an SVG as an HTML image with a description."""
    data = base64.b64encode(svg.encode()).decode()
    return (
        f'<img style="{style}" alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'
    )


def timeline_html(history: History, moment: float = math.inf) -> str:
    """Return a timeline with its legend, and the same as a table.

    Of a long one a part is shown in which single runs can be told apart. At a moment, in seconds
    from the begin, it is what was known then.
    """
    began, ended = part = excerpt([history])
    if moment < math.inf and not began <= moment <= ended:
        part = max(0.0, moment - ended + began), moment
    then = history.began + moment
    return (
        f"<div>{legend_html(among_open=moment < math.inf)}{_timeline_image(history, part, then)}"
        f"<details><summary>The same as a table</summary>{work_table(history, then)}</details>"
        "</div>"
    )


def comparison_html(stories: Sequence[tuple[str, History]]) -> str:
    """Return several timelines, one below the other, on one scale and with one legend.

    Parameters
    ----------
    stories : sequence of (str, History)
        Each with its title.
    """
    histories = [history for _, history in stories]
    part = excerpt(histories)
    parts = [
        f'<div style="margin-top:.6em"><b>{escape(title)}</b>: {len(history.tokens)} tokens in '
        f"{(history.ended - history.began) * 1e3:.0f} ms</div>{_timeline_image(history, part)}"
        for title, history in stories
    ]
    tables = [f"<div>{escape(title)}{work_table(history)}</div>" for title, history in stories]
    return (
        f"<div>{legend_html()}{''.join(parts)}"
        f"<details><summary>The same as tables</summary>{''.join(tables)}</details></div>"
    )


def excerpt(histories: Sequence[History]) -> tuple[float, float]:
    """Return what to show of records on one clock, in seconds from their begin.

    All, if single runs can be told apart in it; if not, as much as lets them, from the first
    token on.
    """
    longest = max((history.ended - history.began for history in histories), default=0.0)
    most = max((legible(history, COLUMNS) for history in histories), default=0.0)
    # What is hardly longer is not cut: its begin and its end tell more than wider bars.
    if longest <= 1.5 * most:
        return 0.0, longest
    first = min(window(history, COLUMNS)[0] - history.began for history in histories)
    return first, min(longest, first + most)


def _timeline_image(history: History, part: tuple[float, float], then: float = math.inf) -> str:
    """Return the picture of a part, in seconds from the begin."""
    began, ended = part
    shown = history.began + began, history.began + ended
    told = _part_told(history, *shown) or f"0 to {ended * 1e3:.0f} ms"
    what = f"Timeline: each node, and when it worked on what, {told}"
    if then < math.inf:
        what += f", as it was at {(then - history.began) * 1e3:.0f} ms"
    return image(timeline_svg(history, shown, then), what)


def legend_html(*, among_open: bool = False) -> str:
    """Return what the bars of a timeline mean; where some are open, of them too."""
    swatches = [
        f'<span style="white-space:nowrap;margin-right:1em">{_swatch(look)} {look.legend}</span>'
        for name, look in LOOKS.items()
        if among_open or name != "open"
    ]
    marks = [
        f'<span style="white-space:nowrap;margin-right:1em">{mark}</span>'
        for mark in (
            "empty: idle",
            "&#9660; tokens become text (how many, if more than one)",
            "&#9478; runs are called off",
            "a number: which run",
        )
    ]
    return f'<div style="font-size:small">{" ".join(swatches + marks)}</div>'


def work_table(history: History, moment: float = math.inf) -> str:
    """Return for each node how many runs it worked on, by fate, and for how long, as HTML."""
    looks = {name: look for name, look in LOOKS.items() if name != "open" or moment < math.inf}
    counts: list[dict[str, int]] = [{} for _ in range(history.trace.stages + 1)]
    busy = [0.0] * (history.trace.stages + 1)
    for work in work_until(history, moment):
        name = look_of(work, moment)
        counts[work.row][name] = counts[work.row].get(name, 0) + 1
        busy[work.row] += work.span.ended - work.span.began
    took = min(history.ended, moment) - history.began
    places = [history.trace.places.get(node_name(row), "") for row in range(len(counts))]
    rows = [
        [
            node_name(row),
            *([places[row]] if any(places) else []),
            *(str(count.get(name, 0)) for name in looks),
            f"{busy[row] / took:.0%}" if took > 0 else "-",
        ]
        for row, count in enumerate(counts)
    ]
    where = ["worker"] if any(places) else []
    return table_html(["node", *where, *(look.meaning for look in looks.values()), "busy"], rows)


def table_html(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all its cells are escaped."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def metrics_html(metrics: Metrics) -> str:
    """Return the figures as a table."""
    rows = [
        ("tokens a second", figure(metrics.tokens_per_s, "{:.1f}")),
        ("time to the first token", figure(metrics.ttft_s, "{:.0f} ms", 1e3)),
        ("mean time between tokens", figure(metrics.itl_s, "{:.1f} ms", 1e3)),
        ("tokens", str(metrics.generated_tokens)),
        ("guesses accepted", figure(metrics.acceptance_rate, "{:.0%}")),
        ("runs, and those called off", f"{metrics.runs}, {metrics.runs_cancelled}"),
        ("layers computed in vain", f"{metrics.layers_wasted} of {metrics.layers_computed}"),
        ("layers saved by calling off", str(metrics.layers_saved)),
        ("stages busy", " ".join(f"{share:.0%}" for share in metrics.stage_utilization)),
    ]
    return table_html(["figure", "value"], rows)


def trace_html(trace: Trace) -> str:
    """Return a part of the trace in which single runs can be told apart, small."""
    history = History(trace)
    if not history.done:
        return f"<div>{escape(repr(trace))}: nothing is done yet</div>"
    return timeline_html(history)


def result_html(trace: Trace, title: str) -> str:
    """Return a finished generation: its text, its figures and a part of its timeline."""
    history = History(trace)
    figures = metrics_html(history.tally.metrics())
    return (
        f"<div><b>{escape(title)}</b>{text_html(history)}"
        f"<details><summary>Figures</summary>{figures}</details>{trace_html(trace)}</div>"
    )


def _paint(look: Look, *, narrow: bool = False) -> str:
    banded = f"narrow-{look.pattern}"
    if narrow and f'id="{banded}"' in PATTERNS:
        return f'fill="url(#{banded})"'
    if look.pattern == "ring":
        return f'fill="#fff" stroke="{look.colour}"'
    if look.pattern == "plain":
        return f'fill="{look.colour}" stroke="#fff" stroke-width=".5"'
    if look.pattern == "hollow":
        return f'fill="#fff" stroke="{look.colour}" stroke-dasharray="3 2"'
    if look.pattern == "outline":
        return f'fill="{look.colour}" fill-opacity=".35" stroke="{look.colour}"'
    return f'fill="url(#{look.pattern})" stroke="{look.colour}" stroke-width=".7"'


def _swatch(look: Look) -> str:
    size = 'xmlns="http://www.w3.org/2000/svg" width="18" height="12" viewBox="0 4 18 12"'
    shape = f"M9 10{RING}" if look.pattern == "ring" else "M1 5h16v10h-16z"
    return image(f'<svg {size}>{PATTERNS}<path d="{shape}" {_paint(look)}/></svg>', "")


def ticks(began: float, ended: float, most: int = 10) -> list[float]:
    """Return round values between two, at most so many of them and one more."""
    length = max(ended - began, 1e-9)
    step = 10 ** math.floor(math.log10(length / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if length / step / factor <= most)
    first = math.ceil(began / step - 1e-9)
    return [round(n * step, 9) for n in range(first, math.floor(ended / step + 1e-9) + 1)]
