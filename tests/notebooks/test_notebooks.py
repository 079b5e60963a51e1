"""The teaching notebooks: they run as they are, and as they are saved they show pictures."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeinfer_dask.trace.picture import LOOKS, legend_html

LACKING = [
    name
    for name in ("ipykernel", "matplotlib", "nbclient", "nbconvert", "nbformat")
    if find_spec(name) is None
]
REASON = f"{', '.join(LACKING)} not installed: needs '.[notebooks]'"
if LACKING and os.environ.get("PIPEINFER_BROWSER") == "1":
    raise ImportError(REASON)
pytestmark = pytest.mark.skipif(bool(LACKING), reason=REASON)

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
MOST_BYTES = 1_500_000
LIMIT_S = 120.0 * float(os.environ.get("PIPEINFER_NOTEBOOK_PATIENCE", "1"))
VIEW = re.compile(r"^(Timeline|Stepper|DraftTree|Metrics|TokenStream)\(|^(board|view)$|dashboard\(")
"""The last line of a cell that shows a live view."""
PICTURE = "data:image/svg+xml;base64,"
PLACES = re.compile(r"/(home|tmp|root|Users|work|var)/\w|[A-Z]:\\\\|site-packages")
"""Of one machine alone."""


def saved(path: Path) -> list[dict[str, Any]]:
    """Return the outputs of all cells as the file has them."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def texts(output: dict[str, Any]) -> str:
    """Return all that an output says, without its pictures."""
    said = [output.get("text", ""), *output.get("data", {}).values()]
    whole = "".join("".join(part) if isinstance(part, list) else str(part) for part in said)
    return re.sub(r"data:image/[^\"]*", "", whole)


def pictures_of_views(cells: list[dict[str, Any]]) -> int:
    """Check that each cell that ends with a view holds its picture; return how many there are."""
    found = 0
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] != "code" or not VIEW.search(source.splitlines()[-1]):
            continue
        found += 1
        pages = [str(output.get("data", {}).get("text/html", "")) for output in cell["outputs"]]
        kept = [page for page in pages if "pipeinfer-picture-" in page]
        assert kept, f"no picture is kept of {source}"
        assert all(Page(page).pictures for page in kept)
    return found


def test_there_are_five_lessons() -> None:
    assert [name.split("_")[0] for name in NAMES] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_where_a_lesson_names_another_one_it_is_a_link_that_leads_there(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    told = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]*\.ipynb)\)", told)
    assert links and all((path.parent / link).is_file() for link in links)
    assert not re.findall(rf"`(?:{'|'.join(NAMES)})`", told)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(120 + 2 * LIMIT_S)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs_from_a_clean_kernel_in_time_without_an_error_or_a_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from notebooks import run

    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    notebook = run.read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    began = time.monotonic()
    run.execute(notebook)  # it raises what a cell raises, and where it takes too long
    took = time.monotonic() - began
    with capsys.disabled():
        sys.stdout.write(f"\n{path.stem}: {took:.0f} s of at most {run.LIMIT_S:.0f}\n")
    run.still(notebook)
    assert pictures_of_views([dict(cell) for cell in notebook.cells]) > 0


@pytest.mark.timeout(60)
def test_a_notebook_that_takes_longer_than_it_may_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nbformat
    from nbclient.exceptions import CellTimeoutError

    from notebooks import run

    monkeypatch.setattr(run, "LIMIT_S", 3.0)
    cells = ["import threading", "threading.Event().wait()"]
    endless = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with pytest.raises(CellTimeoutError):
        run.execute(endless)


VIEW_OF_ONE_THAT_GOES_ON = """
import socket
from threading import Event, Thread

from pipeinfer_dask.simulation import simulate
from pipeinfer_dask.widgets import Timeline


class GoesOn:
    trace = simulate(max_new_tokens=8, stages=2).trace

    def __init__(self):
        self.over = Event()
        self.done = self.over.is_set


def end_when_told():
    with socket.create_connection(("127.0.0.1", {port})) as told:
        told.recv(1)
        run.over.set()
        told.sendall(b"1" if view.feed.wait(30) else b"0")


run = GoesOn()
view = Timeline(run)
Thread(target=end_when_told, daemon=True).start()
view
"""


@pytest.mark.timeout(120)
def test_what_ends_while_no_cell_runs_leaves_its_picture_when_the_next_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS[0].parents[1]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        shown = VIEW_OF_ONE_THAT_GOES_ON.replace("{port}", str(server.getsockname()[1]))
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in (shown, "1 + 1")]
        )

        def between(cell_index: int, **_: object) -> None:
            if cell_index == 0:
                kernel, _address = server.accept()
                with kernel:
                    kernel.settimeout(60)
                    kernel.sendall(b"1")
                    assert kernel.recv(1) == b"1"

        NotebookClient(notebook, on_cell_executed=between).execute()
    assert pictures_of_views([dict(cell) for cell in notebook.cells]) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_saved_notebook_is_small_has_run_to_its_end_and_says_nothing_of_a_machine(
    path: Path,
) -> None:
    from notebooks import run

    notebook = run.read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < MOST_BYTES
    assert "widgets" not in notebook.metadata
    for output in saved(path):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        assert run.WIDGET not in output.get("data", {})
        assert not PLACES.search(texts(output)), texts(output)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_the_legends_of_a_saved_notebook_are_those_of_today(path: Path) -> None:
    pages = ["".join(output.get("data", {}).get("text/html", "")) for output in saved(path)]
    drawn = [page for page in pages if "Timeline: each node" in page]
    assert drawn and all(legend_html() in page for page in drawn)
    keys = [f" {look.legend}</span>" for look in LOOKS.values()]
    assert all(page.count(key) <= page.count(legend_html()) for page in drawn for key in keys)


class Page(HTMLParser):
    """The addresses that a page loads something from, and its pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.pictures: list[str] = []
        self.texts: list[str] = []  # how those of frozen views are written
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("audio", "embed", "iframe", "img", "script", "source", "video"):
            self.loaded.append(values.get("src") or "")
        elif tag in ("link", "image", "object"):
            self.loaded.append(values.get("href") or values.get("data") or "")
        if tag == "pre" and values.get("style"):
            self.texts.append(values["style"] or "")
        if tag == "img" and values.get("alt"):
            self.pictures.append(values.get("src") or "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_nbconvert_makes_of_a_saved_notebook_shows_its_pictures_offline(path: Path) -> None:
    from nbconvert import HTMLExporter

    # Without the two scripts of nbconvert's own page, for formulas and for widgets' state.
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="")
    page = Page(exporter.from_filename(str(path))[0])
    frozen = sum("Timeline: each node" in texts(output) for output in saved(path))
    assert frozen > 0
    assert pictures_of_views(json.loads(path.read_text("utf-8"))["cells"]) > 0
    assert len(page.pictures) >= frozen
    assert all(picture.startswith(PICTURE) for picture in page.pictures)
    assert all("font-family:monospace" in style for style in page.texts)
    assert [address for address in page.loaded if address and not address.startswith("data:")] == []
