"""Draws the pictures of docs/concepts.md, and fills its table: one small pipeline, one idea each.

    python -m docs.make_concepts

All in virtual time, so the same program gives the same files: a test makes them again and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docs.tables import fill, table
from pipeinfer_dask.simulation import Costs, Simulation, simulate
from pipeinfer_dask.trace import History
from pipeinfer_dask.trace.picture import timeline_svg

PAGE = Path(__file__).with_name("concepts.md")
IMAGES = PAGE.with_name("images")
STAGES = 4
PIPELINE = Costs.even(STAGES, stage_s=0.05, token_cost=0.05, draft_cost=0.15, hop_cost=0.02)
WORLD: dict[str, Any] = {"costs": PIPELINE, "acceptance": 0.8, "max_new_tokens": 60, "seed": 7}
SHOWN_S = 1.6
"""What every picture shows, from the first token on, so that they can be compared."""

PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "iterative": ("iterative", {}),
    "speculative": ("speculative", {"k": 4}),
    "asynchronous": ("pipeinfer", {"continuous": False, "sequences": 1}),
    "pipeinfer": ("pipeinfer", {"sequences": 1}),
    "uncancelled": ("pipeinfer", {"sequences": 1, "cancellation": False}),
    "adaptive": ("adaptive", {}),
}
"""For each picture: the strategy, and its knobs."""


def simulated(name: str) -> Simulation:
    """Return the generation that a picture shows."""
    strategy, knobs = PICTURES[name]
    return simulate(strategy, **WORLD, **knobs)


def drawn(name: str) -> str:
    """Return a picture as SVG."""
    history = History(simulated(name).trace)
    began = history.tokens[0].time
    return timeline_svg(history, (began, began + SHOWN_S)) + "\n"


def figures() -> str:
    """Return what each picture's pipeline has come to, as a table."""
    rows = []
    for name in PICTURES:
        trace = simulated(name).trace
        tokens, metrics = History(trace).tokens, trace.metrics()
        shown = sum(token.time <= tokens[0].time + SHOWN_S for token in tokens)
        busy = ", ".join(f"{share:.0%}" for share in metrics.stage_utilization)
        rows.append([name, shown, f"{metrics.tokens_per_s:.1f}", busy])
    return table(
        ["picture", "tokens in the time shown", "tokens/s, whole text", "stages busy"], rows
    )


def filled(page: str) -> str:
    """Return the page with its table made anew."""
    return fill(page, "pictures", figures())


def main() -> None:
    for name in PICTURES:
        (IMAGES / f"concept-{name}.svg").write_text(drawn(name))
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
