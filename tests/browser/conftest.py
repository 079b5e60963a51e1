"""A real JupyterLab, a real kernel and a real browser, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeinfer_dask.bench.browser import Lab, Tab, chromium, missing, notebook_of

THEIRS = ("Canceled future for", "debugger state", "widget model not found")
"""What JupyterLab says when a kernel ends, and of a progress bar that has gone when it reopens."""

Opened = Callable[..., Tab]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = missing()
    for item in items:
        if item.get_closest_marker("browser") is not None:
            item.add_marker(pytest.mark.timeout(300))
            if lacking is not None:
                item.add_marker(pytest.mark.skip(reason=lacking))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(lab: Lab, browser: Any, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """Open a notebook of some cells and run them all; nothing may go wrong in the page."""
    page = browser.new_page(viewport={"width": 1200, "height": 1600})
    tab = Tab(page, lab.url)

    def open_notebook(*cells: str, notebook: str | None = None, wait: bool = True) -> Tab:
        name = f"{request.node.name.translate({ord(c): '-' for c in '[]/'})}.ipynb"
        (lab.notebooks / name).write_text(notebook or notebook_of(*cells))
        tab.open(lab.address_of(name))
        tab.run_all(wait=wait)
        assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
        return tab

    yield open_notebook
    tab.page.evaluate("window.jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
    page.close()
    assert tab.foreign == []
    assert [error for error in tab.errors if not any(theirs in error for theirs in THEIRS)] == []
