"""Puts figures that commands have printed into the second table of docs/performance.md.

    python -m docs.make_printed

What takes a quiet machine and many minutes is written by hand into docs/performance/printed.json,
as it was printed; whether an aim was reached is worked out here. A test makes the table again, and
fails where the page is stale.
"""

from __future__ import annotations

import json
from typing import Any

from docs.make_performance import STORE
from docs.tables import fill, table

PAGE = STORE.with_suffix(".md")


def filled(page: str) -> str:
    """Return the page with its table made anew."""
    return fill(page, "printed", printed_table())


def printed_table() -> str:
    """Return what was written down of figures that take quiet machines and many minutes."""
    rows = []
    for row in json.loads((STORE / "printed.json").read_text(encoding="utf-8")):
        unit = f" {row['unit']}".rstrip()
        beside = f" ({row['beside']})" if "beside" in row else ""
        rows.append(
            [
                row["part"],
                f"{said(row['figures'])}{unit}{beside}",
                verdict(row, unit),
                f"`pipeinfer bench {row['command']}`",
                f"{row['date']}, {row['load']}",
            ]
        )
    return table(["part", "figure", "aim", "command", "measured"], rows)


def said(figures: dict[str, float]) -> str:
    match figures:
        case {"middle": middle, "low": low, "high": high}:
            return f"{middle} (95% confidence {low} to {high})"
        case {"middle": middle, "95th percentile": late, "most": most}:
            return f"{middle} in the middle, {late} at the 95th percentile, at most {most}"
        case {"middle": middle, "least": least, "most": most}:
            return f"{middle} ({least} to {most})"
        case {"least": least, "most": most}:
            return f"{least} to {most}"
        case {"middle": middle}:
            return str(middle)
    raise ValueError(f"expected figures of a known kind, got {figures}")


def verdict(row: dict[str, Any], unit: str) -> str:
    """Return a row's aim, and whether the figure that is held against it has reached it."""
    for side, limit in row.get("aim", {}).items():
        found = row["figures"][row["judged"]]
        reached = found <= limit if side == "most" else found >= limit
        return f"at {side} {limit}{unit}: {'reached' if reached else 'missed'}"
    return ""


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
