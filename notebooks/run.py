"""Runs notebooks, each from a clean kernel, and saves them with pictures instead of widgets.

    python notebooks/run.py             # all of them
    python notebooks/run.py 02 04       # those whose names begin so

A live view is nothing without its kernel. What is saved is the picture that each view gives as
well, so that a page on the web shows it, and a notebook stays small. Whoever runs a cell has
the live view there again. Needs ``.venv/bin/pip install -c constraints.txt -e '.[notebooks]'``.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
LIMIT_S = 120.0 * float(os.environ.get("PIPEINFER_NOTEBOOK_PATIENCE", "1"))
"""Most seconds for one notebook, its kernel's start included."""
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""What kernels find in their environment: nothing is asked of the network."""


def read(path: Path) -> Any:
    """Return a notebook, checked against its format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: Any) -> None:
    """Run all cells in a clean kernel, in an empty directory.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails.
    nbclient.exceptions.CellTimeoutError
        If the notebook takes longer than it may.
    RuntimeError
        If one says anything on stderr, a warning for example.
    """
    ends = time.monotonic() + LIMIT_S
    with TemporaryDirectory() as empty:
        client = NotebookClient(
            notebook,
            timeout_func=lambda cell: max(1, round(ends - time.monotonic())),
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
            resources={"metadata": {"path": empty}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        client.execute(env={**os.environ, **QUIET})
    for output in outputs_of(notebook):
        if output.output_type == "stream" and output.name == "stderr":
            raise RuntimeError(f"expected nothing on stderr, got {output.text}")


def outputs_of(notebook: Any) -> list[Any]:
    """Return the outputs of all cells, in order."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def still(notebook: Any) -> None:
    """Take out what only a running kernel can show, and what differs from machine to machine."""
    here = re.compile(rf"\b{re.escape(platform.node())}(?=, worker )")
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            _rename(output, here)
            if (
                "data" in output
                and output.data.pop(WIDGET, None)
                and "text/html" not in output.data
            ):
                output.data.clear()  # what is left only names the widget
        cell.outputs = [output for output in cell.outputs if output.get("data") != {}]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}}
    )


def _rename(output: Any, here: re.Pattern[str]) -> None:
    """Give this machine, where it holds a node, the name that it has for itself everywhere."""
    held, texts = output.get("data", output), ("text", "text/plain", "text/html")
    for kind in texts:
        if isinstance(held.get(kind), str):
            held[kind] = here.sub("localhost", held[kind])


def main(*names: str) -> None:
    """Run and save the notebooks whose names begin with any of these; without any, all."""
    paths = [path for path in sorted(HERE.glob("*.ipynb")) if path.name.startswith(names or "")]
    if not paths:
        sys.exit(f"expected names that notebooks begin with, got {' '.join(names)}: see {HERE}")
    for path in paths:
        started = time.monotonic()
        notebook = read(path)
        execute(notebook)
        still(notebook)
        nbformat.write(notebook, path)
        took, size = time.monotonic() - started, path.stat().st_size / 1024
        print(f"{path.name}: {took:.0f} s, {size:.0f} KiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
