"""What a terminal shows: loading, text as it comes, and the table of strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.trace import Metrics
from pipeinfer_dask.trace.metrics import figure

if TYPE_CHECKING:  # for the names alone: what only shows figures need not wait for torch
    from pipeinfer_dask.engine import Generation, Loading

# Never by colour alone: accepted tokens are underlined too.
STYLES = {
    Origin.ACCEPTED: "green underline",
    Origin.CORRECTED: "bold yellow",
    Origin.PLAIN: "default",
}


def legend() -> Text:
    """Return what the styles of the streamed text mean."""
    return Text.assemble(
        ("drafted and accepted", STYLES[Origin.ACCEPTED]),
        " | ",
        ("the target's own, against the draft", STYLES[Origin.CORRECTED]),
        " | ",
        ("the target's own, nothing drafted", STYLES[Origin.PLAIN]),
    )


@contextmanager
def loading(console: Console) -> Iterator[Callable[[Loading], None]]:
    """Show a bar for each model while it loads; yields the callback that moves them."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
    )
    # In a file, even a bar that is wiped away would leave a line.
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bars:
        starting = bars.add_task("starting workers", total=None)
        tasks: dict[str, TaskID] = {}

        def tell(step: Loading) -> None:
            bars.update(starting, visible=False)
            if step.node not in tasks:
                tasks[step.node] = bars.add_task(step.node, total=None)
            bars.update(tasks[step.node], completed=step.nbytes, total=step.total)

        yield tell


def stream(console: Console, prompt: str, generation: Generation) -> None:
    """Print the prompt, and behind it the text as it comes, by origin."""
    console.print(Text(prompt, style="dim"), end="", soft_wrap=True)
    try:
        for piece in generation:
            console.print(Text(piece, style=STYLES[piece.origin]), end="", soft_wrap=True)
    finally:
        console.print()


def table(results: Sequence[tuple[str, Metrics]]) -> Table:
    """Return the figures of each strategy, a row for one (its name, metrics)."""
    view = Table(
        box=None, header_style="bold", pad_edge=False, padding=(0, 1), collapse_padding=True
    )
    view.add_column("strategy", no_wrap=True)
    for heading in (
        "tokens/s",
        "TTFT ms",
        "ITL ms",
        "accepted",
        "runs",
        "cancelled",
        "stages busy",
    ):
        view.add_column(heading, justify="right", no_wrap=True)
    for strategy, metrics in results:
        view.add_row(
            strategy,
            figure(metrics.tokens_per_s, "{:.1f}"),
            figure(metrics.ttft_s, "{:.1f}", 1e3),
            figure(metrics.itl_s, "{:.1f}", 1e3),
            figure(metrics.acceptance_rate, "{:.0f}%", 100),
            str(metrics.runs),
            str(metrics.runs_cancelled),
            _shares(metrics.stage_utilization),
        )
    return view


def headings() -> str:
    """Return what the table's headings mean."""
    return (
        "TTFT: time to the first token. ITL: mean time from one token to the next.\n"
        "accepted: share of the guesses put to the target that became text, those behind\n"
        "a wrong one and second choices counted: not the chance of a first choice.\n"
        "cancelled: runs called off, contradicted by the target or too late for the text.\n"
        "stages busy: share of the time that each stage computed; .. first to last."
    )


def _shares(shares: Sequence[float]) -> str:
    """Return each stage's share; of a long pipeline the first's and the last's."""
    ends = shares if len(shares) <= 3 else (shares[0], shares[-1])
    return (" " if len(shares) <= 3 else " .. ").join(f"{share:.0%}" for share in ends)
