"""Puts the benchmarks' tables and pictures into docs/policies.md.

    python -m docs.make_policies                    # from what is stored in docs/performance/
    python -m docs.make_policies policies ablation  # simulates first, many minutes, and stores that

The picture needs ``.venv/bin/pip install -c constraints.txt -e '.[docs]'``. A test makes tables and
picture again, and fails where the page is stale.
"""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

from docs.make_performance import STORE, measure
from docs.tables import fill, table

PAGE = Path(__file__).with_name("policies.md")
PICTURE = PAGE.with_name("images") / "policies.svg"
COLUMNS = (
    "iterative",
    "speculative",
    "speculative_tree",
    "pipeinfer",
    "pipeinfer_tree",
    "adaptive",
    "bound",
    "clairvoyant",
)
STYLES = {  # markers too: never by colour alone
    "iterative": ("0.5", "o"),
    "speculative": ("tab:orange", "s"),
    "pipeinfer": ("tab:blue", "^"),
    "adaptive": ("tab:green", "D"),
}


def stored(suite: str) -> dict[str, Any]:
    """Return what a suite said when it was run."""
    report: dict[str, Any] = json.loads((STORE / f"{suite}.json").read_text(encoding="utf-8"))
    return report


def policies_table(report: dict[str, Any]) -> str:
    rows = []
    for row in report["rows"]:
        chain = row["settings"]["speculative"]["k"]
        setting = row["settings"]["pipeinfer"]
        tuned = f"{row['pipeinfer']:.3f} ({setting['micro_batch']}, {setting['cutoff']})"
        cells = {column: f"{row[column]:.3f}" for column in COLUMNS}
        cells |= {"speculative": f"{row['speculative']:.3f} (k={chain})", "pipeinfer": tuned}
        cells["adaptive"] = f"**{row['adaptive']:.3f}**"
        rows.append([row["stages"], row["acceptance"], row["token_cost"], *cells.values()])
    headings = ["N", "a", "b", *(column.replace("_", " ") for column in COLUMNS)]
    return table(headings, rows)


def summary_table(report: dict[str, Any]) -> str:
    rows = [
        [name, f"{found['geometric_mean']:.2f}", f"{found['least']:.2f} to {found['most']:.2f}"]
        for name, found in report["summary"].items()
    ]
    return table(["ratio", "geometric mean", "rows"], rows)


def ablation_table(report: dict[str, Any]) -> str:
    keys = ["overconfidence", "strategy", "without", "ttft", "itl", "itl_p95"]
    rows = [
        [*(row[key] for key in keys), row["tokens_per_s"], f"{row['ratio']:.2f}", row["wasted"]]
        for row in report["rows"]
    ]
    headings = ["boast", "strategy", "without", "TTFT", "ITL", "ITL p95"]
    return table([*headings, "tokens per T", "ratio", "wasted layers"], rows)


def drawn() -> str:
    """Return as SVG speed over the number of stages, one panel for each acceptance and cost."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    report = stored("policies")
    acceptances = sorted({row["acceptance"] for row in report["rows"]}, reverse=True)
    costs = sorted({row["token_cost"] for row in report["rows"]})
    plt.rcParams["svg.hashsalt"] = "policies"  # the same figures give the same file
    figure, panels = plt.subplots(
        len(costs), len(acceptances), figsize=(10, 6), sharex=True, squeeze=False
    )
    for line, cost in zip(panels, costs, strict=True):
        for panel, acceptance in zip(line, acceptances, strict=True):
            rows = [
                row
                for row in report["rows"]
                if (row["acceptance"], row["token_cost"]) == (acceptance, cost)
            ]
            for column, (colour, marker) in STYLES.items():
                stages = [row["stages"] for row in rows]
                speeds = [row[column] * row["stages"] for row in rows]
                panel.plot(stages, speeds, color=colour, marker=marker, label=column)
            panel.set_title(f"acceptance {acceptance}, token cost {cost}", fontsize=9)
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("stages")
        panel.set_xticks(
            [row["stages"] for row in report["rows"]][:: len(costs) * len(acceptances)]
        )
        panel.xaxis.set_major_formatter("{x:.0f}")
    for line in panels:
        line[0].set_ylabel("tokens per pass of the pipeline")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper center", ncols=len(STYLES))
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    picture = StringIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    plt.close(figure)
    return picture.getvalue()


def filled(page: str) -> str:
    """Return the page with its tables made anew."""
    parts = {
        "policies": policies_table(stored("policies")),
        "summary": summary_table(stored("policies")),
        "ablation": ablation_table(stored("ablation")),
    }
    for name, part in parts.items():
        page = fill(page, name, part)
    return page


if __name__ == "__main__":
    for name in sys.argv[1:]:
        measure(name)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(drawn(), encoding="utf-8")
