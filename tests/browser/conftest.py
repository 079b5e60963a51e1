"""A real JupyterLab, a real kernel and a real browser, for all tests of this folder.

Where one is missing they are skipped; where ``PIPEINFER_BROWSER=1`` all must be there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeinfer_dask.bench.browser import Lab, Tab, chromium, missing, notebook_of

THEIRS = ("Canceled future for", "debugger state")
"""What JupyterLab's own code says when a kernel ends."""
GONE = ("widget model not found", "Error displaying widget")
"""What the widgets' manager says of any widget when its notebook is opened again."""
SEAL = """
import os, socket, sys

def look(event, what):
    if event == "socket.connect" and what[0].type == socket.SOCK_STREAM:
        if what[0].family in (socket.AF_INET, socket.AF_INET6):
            host = str(what[1][0])
            if not host.startswith("127.") and host not in ("::1", "localhost"):
                with open(os.environ["PIPEINFER_SEAL_LOG"], "a") as file:
                    file.write(f"{host}\\n")
                raise PermissionError(f"a process of the tests asked for {host}")

sys.addaudithook(look)
"""
"""What each Python runs at its start, kernels and workers too: it may reach this machine alone."""

Opened = Callable[..., Tab]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("browser") is not None]
    lacking = missing() if marked else None
    if lacking is not None and os.environ.get("PIPEINFER_BROWSER") == "1":
        raise pytest.UsageError(lacking)
    for item in marked:
        item.add_marker(pytest.mark.timeout(300))
        if lacking is not None:
            item.add_marker(pytest.mark.skip(reason=lacking))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for each in terminalreporter.stats.values() for report in each]
    took = [
        report.duration
        for report in reports
        if isinstance(report, pytest.TestReport) and report.nodeid.startswith("tests/browser/")
    ]
    if took:
        terminalreporter.write_line(f"browser tests: {sum(took):.0f} s")


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Seal all processes that are started from now on, and those that they start."""
    home = tmp_path_factory.mktemp("seal")
    (home / "sitecustomize.py").write_text(SEAL)
    asked = home / "asked.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(home), prepend=os.pathsep)
        patch.setenv("PIPEINFER_SEAL_LOG", str(asked))
        yield
    assert not asked.exists(), asked.read_text()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, sealed: None) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # No longer: while it is open, its event loop runs in the thread of all tests.
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
    tab.end_kernel()
    page.close()
    assert tab.foreign == []
    assert [error for error in tab.errors[: tab.reopened] if not is_theirs(error)] == []
    later = tab.errors[len(tab.errors) if tab.reopened is None else tab.reopened :]
    assert [error for error in later if not is_theirs(error) and not is_gone(error)] == []


def is_theirs(error: str) -> bool:
    """Tell whether JupyterLab speaks of itself: a view's module is a blob, an extension runs it."""
    ours = "blob:" in error or "/extensions/anywidget/" in error
    return not ours and any(words in error for words in THEIRS)


def is_gone(error: str) -> bool:
    """Tell whether the manager misses a widget whose kernel has ended."""
    return "/@jupyter-widgets/" in error and any(words in error for words in GONE)
