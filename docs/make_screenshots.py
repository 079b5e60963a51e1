"""Takes the pictures of the views: a real JupyterLab, and real generations of the embedded pair.

    python docs/make_screenshots.py

Needs ``pip install -e '.[browser]'`` and a Chromium. The pictures go to docs/images.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pipeinfer_dask.bench.browser import Lab, Tab, chromium, missing, notebook_of

IMAGES = Path(__file__).parent / "images"
CELLS = (
    """import pipeinfer_dask as pi
from pipeinfer_dask.widgets import DraftTree, Stepper, Timeline

target, draft = pi.demo_pair()
engine = pi.Engine.from_pretrained(target, draft=draft, stages=3)
for strategy in ("iterative", "pipeinfer"):
    engine.generate("def main", strategy=strategy)""",
    "board = engine.dashboard(max_new_tokens=48)\nboard",
    """from pipeinfer_dask.trace import History

def least_disturbed(strategy):
    results = [engine.generate("def main", max_new_tokens=48, strategy=strategy) for _ in range(8)]
    return min(results, key=lambda result: result.metrics.itl_s)

plain, piped = least_disturbed("iterative"), least_disturbed("pipeinfer")
board.show(piped)
Stepper(plain, piped)""",
    "Timeline(piped)",
    """story = History(piped.trace)

def guessed(token):
    return sum(g.ahead > 0 and g.made <= token.time < g.settled for g in story.guesses)

fullest = max(story.tokens, key=guessed)
DraftTree(piped, moment=fullest.time - story.began + 1e-4)""",
)
STEPS = 40


def main() -> None:
    if (lacking := missing()) is not None:
        raise SystemExit(lacking)
    with tempfile.TemporaryDirectory() as home:
        lab = Lab(Path(home))
        try:
            with chromium() as browser:
                tab = Tab(browser.new_page(viewport={"width": 1250, "height": 2400}), lab.url)
                take(lab, tab)
                if tab.errors:
                    raise SystemExit(f"the page has failed: {tab.errors[0]}")
        finally:
            lab.close()


def take(lab: Lab, tab: Tab) -> None:
    (lab.notebooks / "views.ipynb").write_text(notebook_of(*CELLS))
    tab.open(lab.address_of("views.ipynb"))
    page = tab.page
    tab.run_all()
    board, stepper, timeline, tree = (
        page.locator(".jp-Cell").nth(cell).locator(".jp-OutputArea-output") for cell in range(1, 5)
    )
    tree.locator("[data-complete=true]").wait_for(timeout=600_000)
    board.get_by_label("Strategy").select_option("pipeinfer")
    for _ in range(STEPS):
        stepper.get_by_role("button", name="A step ahead").click()
    for theme in ("Light", "Dark"):
        tab.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        page.locator(f"[data-bars][data-theme={theme.lower()}]").nth(3).wait_for()
        save(board, f"dashboard-{theme.lower()}")
        if theme == "Light":
            save(stepper, "stepper")
            save(timeline, "timeline")
            save(tree, "tree")


def save(output: Any, name: str) -> None:
    output.scroll_into_view_if_needed()
    output.screenshot(path=IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
