"""Each notebook of the repository in JupyterLab, as a student goes through it."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeinfer_dask.bench.browser import Lab, Tab
from pipeinfer_dask.widgets.still import WIDGET
from tests.browser.conftest import Opened
from tests.browser.test_views import data, until
from tests.notebooks.test_notebooks import VIEW

pytestmark = pytest.mark.browser
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
TIMELINE = "[data-bars]"
BOARD = "engine.dashboard("
FROZEN = "img[alt]:not([alt=''])"
"""Pictures that say what they show; swatches of a legend say nothing."""
SEEN = """images => images.map(image => {
  const box = image.getBoundingClientRect();
  const clipped = [];
  for (let e = image.parentElement; e; e = e.parentElement) {
    const style = getComputedStyle(e), around = e.getBoundingClientRect();
    const hides = style.overflowX !== "visible" && e.scrollWidth > e.clientWidth + 1;
    if (hides && box.right > around.right + 1) clipped.push(e.className);
  }
  return {width: box.width, height: box.height, loaded: image.naturalWidth, clipped};
})"""


def with_its_engine_open(path: Path) -> str:
    """Return a notebook with buttons without the cells after them, which close the engine."""
    notebook = json.loads(path.read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    boards = [n for n, source in enumerate(sources) if BOARD in source]
    del notebook["cells"][boards[-1] + 2 if boards else len(sources) :]
    return json.dumps(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_views_live(
    path: Path, opened: Opened, lab: Lab, tmp_path: Path
) -> None:
    if find_spec("matplotlib") is None:
        lacks = pytest.fail if os.environ.get("PIPEINFER_BROWSER") == "1" else pytest.skip
        lacks("notebooks draw: needs '.[notebooks]'")
    tab = opened(notebook=with_its_engine_open(path))
    page = tab.page
    button = page.locator(".jupyter-button[title=Run]")
    assert button.count() == (BOARD in path.read_text())
    if button.count():
        button.first.click()
        # Clicked by the page itself, unless the text was faster.
        page.wait_for_function(
            r"""() => {
              const cancel = document.querySelector(".jupyter-button[title=Cancel]");
              if (!cancel.disabled) cancel.click();
              return !cancel.disabled || /finished: \d+ tokens/.test(document.body.textContent);
            }"""
        )
        page.get_by_text(re.compile(r"(stopped|finished): \d+ tokens")).first.wait_for()
    if page.locator(TIMELINE).count():
        before = until(tab, TIMELINE, "Number(data.bars) > 0 && data.complete === 'true'")
        page.get_by_role("button", name="Zoom in").first.click()
        until(tab, TIMELINE, f"data.to !== '{before['to']}'")
        tab.command("apputils:change-theme", theme="JupyterLab Dark")
        until(tab, TIMELINE, "data.theme === 'dark'")
        assert data(tab, TIMELINE)["bars"] == before["bars"]
        picture = page.locator(TIMELINE).first.screenshot(path=tmp_path / "timeline.png")
        assert len(picture) > 3_000  # an empty canvas packs to less
        tab.command("apputils:change-theme", theme="JupyterLab Light")
    tab.command("docmanager:save")
    (saved,) = lab.notebooks.glob(f"*{path.stem}*.ipynb")
    cells = json.loads(saved.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    assert tab.errors == [], "\n".join(tab.errors)
    tab.open(lab.address_of(saved.name))  # again, as it was saved
    page.locator(".jp-OutputArea-output").first.wait_for()
    assert page.locator(".jp-CodeCell").count() == sum(c["cell_type"] == "code" for c in cells)


STANDS = """cell => {
  const picture = cell.querySelector("[class^=pipeinfer-picture]");
  const { top, bottom, height } = picture.getBoundingClientRect();
  const cut = [];
  for (let e = picture.parentElement; e; e = e.parentElement) {
    if (e.classList.contains("jp-WindowedPanel-outer")) break; // what the reader scrolls
    const around = e.getBoundingClientRect();
    const hides = getComputedStyle(e).overflowY !== "visible";
    if (hides && (bottom > around.bottom + 1 || top < around.top - 1)) cut.push(e.className);
  }
  const images = picture.querySelectorAll("img").length;
  return { height, cut, images, text: picture.innerText.length };
}"""


def test_a_lesson_that_is_opened_again_without_its_kernel_shows_a_picture_of_every_view(
    opened: Opened, lab: Lab
) -> None:
    lesson = NOTEBOOKS[0]
    tab = opened(notebook=lesson.read_text())
    page = tab.page
    tab.command("docmanager:save")
    (saved,) = lab.notebooks.glob("test_a_lesson_that_is_opened_again*.ipynb")
    code = [c for c in json.loads(saved.read_text())["cells"] if c["cell_type"] == "code"]
    last = ["".join(cell["source"]).strip().splitlines()[-1] for cell in code]
    views = [at for at, line in enumerate(last) if VIEW.search(line)]
    assert len(views) >= 3
    for at in views:  # as it is saved: the view, and behind it its picture
        kept = [output["data"] for output in code[at]["outputs"] if "data" in output]
        assert any(WIDGET in data for data in kept)
        pages = ["".join(data.get("text/html", "")) for data in kept]
        assert [page for page in pages if "pipeinfer-picture-" in page and len(page) > 500]
    tab.end_kernel()
    tab.open(lab.address_of(saved.name))
    page.locator("[class^=pipeinfer-picture]").nth(len(views) - 1).wait_for()
    cells = page.locator(".jp-CodeCell")
    assert cells.count() == len(code)
    for at in views:
        cell = cells.nth(at)
        cell.scroll_into_view_if_needed()
        seen = cell.evaluate(STANDS)
        assert seen["height"] > 60 and seen["cut"] == [], last[at]
        assert seen["images"] or seen["text"] > 100, last[at]
    # Of a legend's swatches JupyterLab says that they have no description.
    timelines = page.locator("[class^=pipeinfer-picture] img[alt^='Timeline: ']")
    pictures = timelines.evaluate_all(SEEN)
    assert pictures
    for picture in pictures:
        assert picture["loaded"] > 300 and picture["width"] > 300 and picture["clipped"] == []
    assert not page.locator(".pipeinfer").count()  # nothing of it lives


def pictures_are_seen(page: Any) -> int:
    """Check that each frozen picture is there in full; return how many there are."""
    pictures = page.locator(f"{FROZEN} >> visible=true").evaluate_all(SEEN)
    for picture in pictures:
        assert picture["loaded"] > 0
        assert picture["width"] > 200 and picture["height"] > 40
        assert picture["clipped"] == []
    return len(pictures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_saved_notebook_is_a_page_whose_pictures_are_seen_offline(
    path: Path, browser: Any, tmp_path: Path
) -> None:
    from nbconvert import HTMLExporter

    # Formulas and widgets' state would come from the network; the lessons have neither.
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="")
    file = tmp_path / "page.html"
    file.write_text(exporter.from_filename(str(path))[0], "utf-8")
    page = browser.new_page(viewport={"width": 1100, "height": 1600})
    tab = Tab(page, file.as_uri())
    page.goto(file.as_uri())
    assert pictures_are_seen(page) > 0
    page.close()
    assert tab.foreign == []
    assert tab.errors == []
