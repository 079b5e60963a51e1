"""The text of a trace as HTML: where each token came from, and what was guessed instead."""

from __future__ import annotations

from collections import defaultdict
from html import escape

from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.trace.history import History

ORIGINS = {
    Origin.ACCEPTED: ("#007a59", "underline solid", "guessed by the draft model, and accepted"),
    Origin.CORRECTED: ("#9a5b00", "underline wavy", "the target's own, against a guess"),
    Origin.PLAIN: ("inherit", "none", "the target's own, nothing was guessed"),
}
"""For each origin: a colour, a line below it, and what it means."""

GROUND, INK = "#fff", "#222"
"""Of text whose marks have colours: these can be read on no dark page."""
# A page's own style may give `pre` its font, and then what is in it another one.
TEXT = (
    "white-space:pre-wrap;overflow-wrap:anywhere;color:inherit;background:inherit;"
    "font-family:monospace"
)
STRUCK = "color:#b00020;text-decoration:line-through;margin:0 2px"


def text_html(history: History, *, struck: bool = False) -> str:
    """Return the text, each token marked by where it came from.

    Parameters
    ----------
    history : History
    struck : bool
        Whether the text with the rejected guesses in it, struck through, is open at once.

    Returns
    -------
    str
        HTML without scripts.
    """
    spans = [
        f'<span style="color:{colour};text-decoration:{line}" title="{meaning}">'
        f"{escape(text)}</span>"
        for token, text in zip(history.tokens, pieces_of(history), strict=True)
        for colour, line, meaning in [ORIGINS[token.origin]]
    ]
    key = " | ".join(
        f'<span style="color:{colour};text-decoration:{line}">{meaning}</span>'
        for colour, line, meaning in ORIGINS.values()
    )
    return (
        f'<div style="background:{GROUND};color:{INK};padding:4px 8px">'
        f'<pre style="{TEXT}">{"".join(spans)}</pre>'
        f"<small>{key}</small>{_with_rejected(history, spans, struck=struck)}</div>"
    )


def pieces_of(history: History) -> list[str]:
    """Return what each token of the text added to it."""
    trace = history.trace
    known = trace.pieces[: len(history.tokens)]
    return known + [trace.text_of(token.guess.token) for token in history.tokens[len(known) :]]


def visible(text: str) -> str:
    """Return a token as it can be seen: spaces and line ends have signs."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def _with_rejected(history: History, spans: list[str], *, struck: bool) -> str:
    """Return the text with what was guessed at each place and ruled out, if anything was."""
    out: dict[int, dict[str, None]] = defaultdict(dict)  # texts by position, each once
    for guess in history.settled:
        if guess.ahead and not guess.kept:
            out[guess.position][visible(history.trace.text_of(guess.token))] = None
    if not out:
        return ""
    parts = [
        "".join(f'<s style="{STRUCK}">{escape(text)}</s>' for text in out[token.guess.position])
        + span
        for token, span in zip(history.tokens, spans, strict=True)
    ]
    return (
        f"<details{' open' if struck else ''}><summary>with rejected guesses, "
        f'<s style="{STRUCK}">struck through</s></summary>'
        f'<pre style="{TEXT}">{"".join(parts)}</pre></details>'
    )
