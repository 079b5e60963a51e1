"""A static picture of the draft tree, at the moment at which it has most to show."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from html import escape
from itertools import count
from typing import NamedTuple

from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.trace.history import History
from pipeinfer_dask.trace.parts import Guess
from pipeinfer_dask.trace.picture import image, table_html
from pipeinfer_dask.trace.text import GROUND, INK, ORIGINS, visible

WIDTH, HEIGHT, GAP_X, GAP_Y, BEFORE = 96, 47, 18, 6, 2
"""Of a box and the room between two, in pixels; how much of the text is before the guesses."""
SMALLEST = 0.7
"""A picture that is too wide is drawn smaller as far as it can be read, and then scrolls."""
MOST_OPEN, MOST_OUT = 20, 8
"""Most guesses that are drawn: of those that are open, and of those just ruled out."""
LETTERS = 11


class Kind(NamedTuple):
    """How the box of a token is drawn, and what that means."""

    meaning: str
    colour: str
    wide: float
    dashes: str = "none"
    struck: bool = False


KINDS = {
    "text": Kind("text", ORIGINS[Origin.ACCEPTED][0], 3),
    "asked": Kind("a guess, the target is asked", "#cc79a7", 1.5),
    "guessed": Kind("only guessed", "#cc79a7", 1.5, dashes="4 3"),
    "out": Kind("ruled out just now", "#d55e00", 1.5, struck=True),
}


@dataclass(slots=True, eq=False)
class Box:
    """A token in the picture: its column and its row, in boxes."""

    guess: Guess
    kind: str
    column: int
    parent: Box | None
    row: float = 0.0


def tree_html(history: History, moment: float | None = None) -> str:
    """Return what was guessed to follow the text at a moment.

    Parameters
    ----------
    history : History
    moment : float, seconds, optional
        From the begin; by default one when the tree was full.

    Returns
    -------
    str
        HTML without scripts: an image with a description, its legend, and the same as a table.
    """
    moment = _fullest(history) if moment is None else history.began + moment
    text, opened, out = _state(history, moment)
    if not text:
        return "<div>No text yet.</div>"
    drawn = {*_likeliest(opened, MOST_OPEN), *_likeliest(out, MOST_OUT)}
    below: dict[Guess, list[Guess]] = defaultdict(list)
    for guess in (*opened, *out):
        if guess in drawn and guess.parent is not None:
            below[guess.parent].append(guess)
    boxes = _placed(text, below, set(out), moment)
    then, end = (1e3 * (time - history.began) for time in (moment, history.ended))
    at = f"at {min(then, end):.0f} of {end:.0f} ms"
    counts = f"{len(opened)} guesses open, {len(out)} ruled out just now"
    all_drawn = len(boxes) - len(text) == len(opened) + len(out)
    some = "" if all_drawn else ", the likeliest shown"
    told = f"{counts}{some}" if opened or out else "nothing was guessed"
    svg, wide = _svg(history, boxes, moment)
    style = f"width:100%;min-width:{SMALLEST * wide:.0f}px;max-width:{wide}px"
    return (
        f"<div><b>Draft tree</b> {at}: {told}"
        f'<div style="overflow-x:auto">{image(svg, f"Draft tree {at}: {counts}", style)}</div>'
        f"{_legend()}<details><summary>The same as a table</summary>"
        f"{_table(history, boxes, moment)}</details></div>"
    )


def _fullest(history: History) -> float:
    """Return when the picture has most to show; without any guess, the end.

    First those that are open count, as many as are drawn, then those just ruled out.
    """
    changes, out = Counter[float](), {token.time: 0 for token in history.tokens}
    for guess in history.guesses:
        if guess.ahead:
            changes[guess.made] += 1
            if guess.settled is not None:
                changes[guess.settled] -= 1
                if guess.settled in out:
                    out[guess.settled] += not guess.kept
    moment, most = history.ended, (0, 0, 0)
    opened = gone = 0
    for time in sorted({*changes, *out}):
        opened += changes[time]
        gone = out.get(time, gone)
        shown = min(opened, MOST_OPEN), min(gone, MOST_OUT), opened
        if opened and shown > most:
            moment, most = time, shown
    return moment


def _state(history: History, moment: float) -> tuple[list[Guess], list[Guess], list[Guess]]:
    """Return the end of the text, what is open, and what the last commitment has ruled out."""
    last = max((token.time for token in history.tokens if token.time <= moment), default=moment)
    text: list[Guess] = []
    opened, out = [], []
    for guess in history.guesses:
        if guess.made > moment:
            continue
        if guess.settled is None or guess.settled > moment:
            opened.append(guess)
        elif not guess.kept and guess.settled >= last:
            out.append(guess)
    kept = [guess for guess in history.guesses if guess.kept and (guess.settled or 0.0) <= moment]
    end = max(kept, key=lambda guess: guess.position, default=None)
    while end is not None and len(text) < BEFORE:
        text.insert(0, end)
        end = end.parent
    return text, opened, out


def _likeliest(guesses: list[Guess], most: int) -> list[Guess]:
    """Return those that have the best chances as a whole chain; of each its parents, too."""
    reach: dict[Guess, float] = {}
    for guess in guesses:  # parents first
        before = 1.0 if guess.parent is None else reach.get(guess.parent, 1.0)
        reach[guess] = before * guess.confidence
    return sorted(guesses, key=lambda guess: -reach[guess])[:most]


def _placed(
    text: list[Guess], below: dict[Guess, list[Guess]], out: set[Guess], moment: float
) -> list[Box]:
    """Return a box for each token, parents first: a chain of text, and what hangs from it."""
    rows = count()
    boxes: list[Box] = []

    def placed(guess: Guess, column: int, parent: Box | None) -> Box:
        asked = guess.placed is not None and guess.placed <= moment
        kind = "out" if guess in out else "asked" if asked else "guessed"
        box = Box(guess, "text" if guess in text else kind, column, parent)
        boxes.append(box)
        next_text = text[column + 1 : column + 2] if box.kind == "text" else []
        # What follows in the text comes first, so that the text is one line.
        children = [*next_text, *(child for child in below[guess] if child not in next_text)]
        taken = [placed(child, column + 1, box).row for child in children]
        if not taken:
            box.row = next(rows)
        else:
            box.row = taken[0] if next_text else (taken[0] + taken[-1]) / 2
        return box

    placed(text[0], 0, None)
    return boxes


def _svg(history: History, boxes: list[Box], moment: float) -> tuple[str, int]:
    """Return the picture, and how wide it is in pixels."""
    wide = (WIDTH + GAP_X) * (1 + max(box.column for box in boxes)) - GAP_X + 4
    high = int((HEIGHT + GAP_Y) * (1 + max(box.row for box in boxes))) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" '
        f'viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="11" fill="{INK}">'
        f'<rect width="100%" height="100%" fill="{GROUND}"/>'
    ]
    for box in boxes:
        if box.parent is not None:
            left, right = _corner(box.parent)[0] + WIDTH, _corner(box)[0]
            top, bottom = (_corner(each)[1] + HEIGHT / 2 for each in (box.parent, box))
            parts.append(
                f'<path d="M{left} {top:g}C{right - 5} {top:g} {right - 13} {bottom:g} {right} '
                f'{bottom:g}" fill="none" stroke="{INK}" stroke-opacity=".5" '
                f'stroke-width="{0.7 + 2.5 * box.guess.confidence:.1f}"/>'
            )
    for box in boxes:
        (x, y), kind = _corner(box), KINDS[box.kind]
        word = escape(visible(history.trace.text_of(box.guess.token))[:LETTERS])
        struck = ' text-decoration="line-through"' if kind.struck else ""
        where = _where(box.guess, moment)
        sure = "" if box.kind == "text" else f"{box.guess.confidence:.0%}"
        parts.append(
            f'<g opacity="{0.65 if kind.struck else 1}">{_frame(kind, x, y, WIDTH, HEIGHT)}'
            f'<text x="{x + 7}" y="{y + 14:g}" font-family="monospace" font-weight="bold"'
            f'{struck}>{word}</text><text x="{x + 7}" y="{y + 27:g}">{sure}</text>'
            f'<text x="{x + 7}" y="{y + 40:g}" font-size="{10 if len(where) > 14 else 11}">'
            f"{where}</text></g>"
        )
    return "".join([*parts, "</svg>"]), wide


def _corner(box: Box) -> tuple[int, float]:
    return 2 + box.column * (WIDTH + GAP_X), 4 + box.row * (HEIGHT + GAP_Y)


def _frame(kind: Kind, x: float, y: float, width: int, height: int) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="{min(5, height / 4):g}" '
        f'fill="{GROUND}" stroke="{kind.colour}" stroke-width="{kind.wide}" '
        f'stroke-dasharray="{kind.dashes}"/>'
    )


def _where(guess: Guess, moment: float) -> str:
    """Return which run evaluates a token, and in which slot, if one does by then."""
    if guess.placed is None or guess.placed > moment:
        return ""
    return f"run {guess.run} slot {guess.slot}"


def _legend() -> str:
    size = 'xmlns="http://www.w3.org/2000/svg" width="30" height="14" viewBox="0 0 30 14"'
    line = f'<path d="M6 7H24" stroke="{INK}"/>'
    keys = []
    for kind in KINDS.values():
        drawn = _frame(kind, 2, 2, 26, 10) + (line if kind.struck else "")
        keys.append(f"{image(f'<svg {size}>{drawn}</svg>', '')} {kind.meaning}")
    keys += ["%: how sure the draft model is", "slot: place in the cache"]
    spans = [f'<span style="white-space:nowrap;margin-right:1em">{key}</span>' for key in keys]
    return f'<div style="font-size:small">{" ".join(spans)}</div>'


def _table(history: History, boxes: list[Box], moment: float) -> str:
    """Return the guesses that are drawn, and what became of each later, as a table."""

    def word(guess: Guess) -> str:
        return visible(history.trace.text_of(guess.token))

    def came_to(guess: Guess) -> str:
        return "open" if guess.settled is None else "became text" if guess.kept else "ruled out"

    rows = [
        [
            word(box.guess),
            word(box.parent.guess) if box.parent is not None else "",
            KINDS[box.kind].meaning,
            f"{box.guess.confidence:.0%}",
            _where(box.guess, moment),
            came_to(box.guess),
        ]
        for box in boxes
        if box.kind != "text"
    ]
    return table_html(["guess", "after", "what it is", "how sure", "where", "in the end"], rows)
