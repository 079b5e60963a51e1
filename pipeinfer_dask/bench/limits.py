"""The limits of a suite's figures, and whether a report keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def judged(
    report: dict[str, Any], *, least: Mapping[str, float], most: Mapping[str, float]
) -> dict[str, Any]:
    """Return a report with ``limits``, in words, and ``within``: whether each one is kept.

    Parameters
    ----------
    report : dict
    least, most : mapping
        What a figure of the report may be, by its name. What was not measured, and is None, keeps
        no limit and breaks none.
    """
    limits: dict[str, str] = {}
    within: dict[str, bool | None] = {}
    for name, limit in least.items():
        limits[name] = f"at least {limit:g}"
        within[name] = None if report[name] is None else report[name] >= limit
    for name, limit in most.items():
        limits[name] = f"at most {limit:g}"
        within[name] = None if report[name] is None else report[name] <= limit
    return report | {"limits": limits, "within": within}


def check(report: Mapping[str, Any]) -> None:
    """Raise a RuntimeError that names the limits which a report's figures break, if any."""
    broken = [name for name, kept in report.get("within", {}).items() if kept is False]
    if broken:
        said = (f"{name} of {report['limits'][name]}, got {report[name]:g}" for name in broken)
        raise RuntimeError(f"expected {'; '.join(said)}: see the rows of the report")
