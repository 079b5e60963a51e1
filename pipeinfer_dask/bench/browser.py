"""A real JupyterLab and a real browser without a screen, for benchmarks and tests of the views.

Needs ``pip install 'pipeinfer-dask[browser]'`` and a Chromium (``apt-get install chromium``).
Nothing but the lab itself can be reached from the browser.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

PATIENCE_S = 60.0
"""Most seconds to wait for a lab to start, or for something to show."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str | None:
    """Return what is missing to run a browser, and how to get it; None if nothing is."""
    for name in ("jupyterlab", "nbconvert", "playwright"):
        if find_spec(name) is None:
            return f"{name} is not installed: pip install 'pipeinfer-dask[browser]'"
    if not any(map(shutil.which, BROWSERS)):
        return "there is no Chromium: apt-get install chromium"
    return None


class Lab:
    """A JupyterLab of its own: on a free port, with a token, in an empty home.

    Parameters
    ----------
    home : Path
        An empty directory; notebooks are in its ``notebooks``.

    Attributes
    ----------
    notebooks : Path
    url : str
    """

    def __init__(self, home: Path) -> None:
        self.notebooks = home / "notebooks"
        self.notebooks.mkdir(parents=True)
        settings = {
            "apputils-extension/notification": {
                "fetchNews": "false",
                "checkForUpdates": False,
                "doNotDisturbMode": True,
            },
            "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page
        }
        for name, values in settings.items():
            path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(values))
        places = {
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
            "IPYTHONDIR": "ipython",
        }
        environment = {name: str(home / place) for name, place in places.items()}
        self._token = secrets.token_hex(16)
        self._log = (home / "lab.log").open("w")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                "--ServerApp.ip=127.0.0.1",
                "--ServerApp.port=0",
                f"--ServerApp.root_dir={self.notebooks}",
                f"--IdentityProvider.token={self._token}",
                "--LabApp.expose_app_in_browser=True",
                "--LabApp.news_url=",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            ],
            env={**os.environ, **environment},
            stdout=self._log,
            stderr=self._log,
        )
        try:
            self.url = self._find(home / "runtime")
        except BaseException:
            self.close()
            raise

    def _find(self, runtime: Path) -> str:
        """Wait until the server answers; return its address."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            # The file may be there before it is whole, and before anybody listens.
            with suppress(OSError, ValueError):
                for file in runtime.glob("jpserver-*.json"):
                    address = str(json.loads(file.read_text())["url"])
                    with urllib.request.urlopen(f"{address}api", timeout=PATIENCE_S):
                        return address
            time.sleep(0.1)
        raise RuntimeError(f"JupyterLab did not start: see {self._log.name}")

    def address_of(self, notebook: str) -> str:
        """Return the address at which a notebook is opened."""
        return f"{self.url}lab/tree/{notebook}?token={self._token}&reset"

    def close(self) -> None:
        """End the lab and its kernels."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Tab:
    """A page of the browser, and what went wrong in it.

    Attributes
    ----------
    page : playwright.sync_api.Page
    foreign : list of str
        Addresses outside the lab that were asked for; none was reached.
    errors : list of str
        Of the page and of its console, each with where it comes from.
    reopened : int or None
        How many of the errors there were when a page was opened again, if one was.
    """

    def __init__(self, page: Page, home: str) -> None:
        self.page = page
        self._home = home
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.reopened: int | None = None
        self._opened = False
        page.set_default_timeout(1e3 * PATIENCE_S)

        def check(route: Any) -> None:
            if route.request.url.startswith((self._home, "data:", "blob:")):
                route.continue_()
            else:
                self.foreign.append(route.request.url)
                route.abort()

        page.route("**/*", check)
        page.on("websocket", self._check_socket)
        page.on("pageerror", self._fail)
        page.on("console", self._note)

    def _fail(self, error: Any) -> None:
        # JupyterLab's core fails now and then by itself, as when it changes its theme; the
        # modules of widgets are blobs.
        if "/static/lab/" not in error.stack or "blob:" in error.stack:
            self.errors.append(f"{error} {error.stack}")

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} {message.location['url']}")

    def _check_socket(self, socket: Any) -> None:
        if not socket.url.startswith(self._home.replace("http", "ws", 1)):
            self.foreign.append(socket.url)

    def open(self, address: str) -> None:
        """Open a notebook, and wait for its kernel."""
        if self._opened and self.reopened is None:
            self.reopened = len(self.errors)
        self._opened = True
        self.page.goto(address)
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell?.currentWidget?.context?.sessionContext"
        )
        self.page.evaluate(
            """async () => {
              await window.jupyterapp.restored;
              const context = window.jupyterapp.shell.currentWidget.context;
              await context.ready;
              await context.sessionContext.ready;
              await context.sessionContext.session.kernel.info;
            }"""
        )

    def end_kernel(self) -> None:
        """End the notebook's kernel."""
        context = "window.jupyterapp.shell.currentWidget.context.sessionContext"
        self.page.evaluate(f"{context}.shutdown()")

    def command(self, name: str, **options: Any) -> None:
        """Carry out one of JupyterLab's commands, and wait for it."""
        self.page.evaluate(
            "([name, options]) => window.jupyterapp.commands.execute(name, options)",
            [name, options],
        )

    def run_all(self, *, wait: bool = True) -> None:
        """Run all cells; return when they are done, or at once."""
        # What a function of a page returns is awaited.
        run = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
        self.page.evaluate(f"() => {{ {'return ' if wait else ''}{run} }}")


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser of Playwright's, without a screen."""
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def notebook_of(*cells: str) -> str:
    """Return a notebook with these cells of code, as JSON."""
    return json.dumps(
        {
            "cells": [
                {
                    "cell_type": "code",
                    "id": f"cell{number}",
                    "metadata": {},
                    "execution_count": None,
                    "outputs": [],
                    "source": source,
                }
                for number, source in enumerate(cells)
            ],
            "metadata": {
                "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
            },
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    )
