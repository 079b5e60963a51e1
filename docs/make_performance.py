"""Puts what benchmarks have measured into the tables of docs/performance.md.

    python -m docs.make_performance             # from what is stored in docs/performance/
    python -m docs.make_performance head shard   # measures these suites first, and stores that

What is stored says on which machine it was measured, when, and how busy that was. A test makes
the table again, and fails where the page is stale.
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

PAGE = Path(__file__).with_name("performance.md")
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


def filled(page: str) -> str:
    """Return the page with its table made anew."""
    rows = []
    for suite, told in SUITES.items():
        report = json.loads((STORE / f"{suite}.json").read_text(encoding="utf-8"))
        where = report["machine"]
        measured = f"{where['date']}, {where['cores']} cores, load {where['load']}"
        rows += [[*row, f"`pipeinfer bench {suite}`", measured] for row in told(report["rows"])]
    return fill(page, "parts", table(["part", "figure (median)", "command", "measured"], rows))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        measure(name)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
