"""Puts what benchmarks have measured into tables of docs/performance.md and several-users.md.

    python -m docs.make_performance             # from what is stored in docs/performance/
    python -m docs.make_performance head shard   # measures these suites first, and stores that

What is stored says on which machine it was measured, when, and how busy that was; what is said of
several users in virtual time is simulated each time. A test makes the tables again, and fails where
a page is stale.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

from docs.tables import fill, table
from pipeinfer_dask.simulation import Costs, simulate_together

PARTS = Path(__file__).with_name("performance.md")
USERS = Path(__file__).with_name("several-users.md")
STORE = Path(__file__).with_name("performance")

Row = tuple[str, str]
"""A part, and its figure."""


def head(rows: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield an event of the scheduler, with as many live nodes as long pipelines have."""
    for row in rows:
        if row["stages"] <= 64:
            part = f"the scheduler, an event of `{row['strategy']}` on {row['stages']} stages"
            yield f"{part}, {row['live_nodes']} nodes live", f"{row['event_us_p50']:.0f} us"


def shard(rows: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield one token and several, in our code and in the family's own."""
    one = rows[0]
    for row in rows:
        tokens, times = row["tokens"], row["ours_ms"] / one["ours_ms"]
        yield (
            f"three layers of {row['family']}, {row['hidden_size']} wide, tokens: {tokens}",
            f"{row['ours_ms']:.1f} ms, {row['transformers_ms']:.1f} in the family's own code"
            + (f"; {times:.2f} times one token" if row is not one else ""),
        )


SUITES: dict[str, Callable[[list[dict[str, Any]]], Iterator[Row]]] = {"head": head, "shard": shard}
"""Those whose figures are stored, and what the table says of them."""
OPTIONS: dict[str, dict[str, Any]] = {
    "shard": {"families": ("llama",), "hidden_sizes": (2048,), "tokens": (1, 6)},
}
"""Of suites of which the table shows a part."""


def machine() -> dict[str, Any]:
    """Return where and when this is."""
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "date": date.today().isoformat(),
        "processor": models[0] if models else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }


def measure(suite: str) -> None:
    """Run a suite, and store what it says."""
    where = machine()  # before the suite makes it busier
    run = getattr(import_module(f"pipeinfer_dask.bench.{suite}"), f"run_{suite}_bench")
    STORE.mkdir(exist_ok=True)
    report = json.dumps({"machine": where, **run(**OPTIONS.get(suite, {}))}, indent=1)
    (STORE / f"{suite}.json").write_text(report + "\n", encoding="utf-8")


def stored(suite: str) -> tuple[dict[str, Any], str]:
    """Return what a suite has said, and where and when it did."""
    report = json.loads((STORE / f"{suite}.json").read_text(encoding="utf-8"))
    where = report["machine"]
    return report, f"{where['date']}, {where['cores']} cores, load {where['load']}"


def parts(page: str) -> str:
    """Return the page with its table of what parts cost made anew."""
    rows = []
    for suite, told in SUITES.items():
        report, measured = stored(suite)
        rows += [[*row, f"`pipeinfer bench {suite}`", measured] for row in told(report["rows"])]
    return fill(page, "parts", table(["part", "figure (median)", "command", "measured"], rows))


def load(page: str) -> str:
    """Return the page with its table of requests at once made anew."""
    report, measured = stored("load")
    rows = [
        [
            row["requests"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['speedup']:.2f}",
            f"{1e3 * row['itl_s']:.0f} ms",
            f"{1e3 * row['itl_p95_s']:.0f} ms",
            f"{row['spread']:.2f}",
        ]
        for row in report["rows"]
    ]
    headings = (
        "requests",
        "tokens/s together",
        "times one alone",
        "ITL",
        "ITL, p95",
        "fastest by slowest",
    )
    return fill(page, "load", f"{table(headings, rows)}\n\nMeasured {measured}.")


def speeds_together(strategy: str, requests: int) -> list[float]:
    """Return what the load suite's pipeline gives each of several requests, in tokens/s."""
    costs = Costs.even(4, stage_s=0.05, token_cost=0.05)
    shared = simulate_together(strategy, requests, costs=costs, acceptance=0.79)
    return [one.metrics.tokens_per_s or 0.0 for one in shared]


def together(page: str) -> str:
    """Return the page with its table of requests at once in virtual time made anew."""
    rows = []
    (alone,) = speeds_together("adaptive", 1)
    for requests in (1, 2, 4, 8, 16):
        speeds = speeds_together("adaptive", requests)
        all_of_them = requests * min(speeds)  # until the last one has ended
        rows.append(
            [
                requests,
                f"{all_of_them:.1f}",
                f"{all_of_them / alone:.2f}",
                f"{min(speeds):.1f}, {max(speeds):.1f}",
            ]
        )
    headings = (
        "requests",
        "tokens/s together",
        "times one alone",
        "tokens/s of the slowest and the fastest",
    )
    return fill(page, "together", table(headings, rows))


def users(page: str) -> str:
    """Return the page on several users with both of its tables made anew."""
    return load(together(page))


PAGES: dict[Path, Callable[[str], str]] = {PARTS: parts, USERS: users}
"""By page, who puts its table in."""


if __name__ == "__main__":
    for name in sys.argv[1:]:
        measure(name)
    for path, filled in PAGES.items():
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
