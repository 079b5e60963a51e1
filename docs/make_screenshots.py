"""Takes the pictures of the views: a real JupyterLab, and real generations of the embedded pair.

Its layers are made to take as long as those of large models.

    python docs/make_screenshots.py

Needs ``.venv/bin/pip install -c constraints.txt -e '.[browser]'`` and a Chromium. The
pictures go to docs/images.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pipeinfer_dask.bench.browser import Lab, Tab, chromium, missing, notebook_of

PROMPT = "import "
IMAGES = Path(__file__).parent / "images"
CELLS = (
    """import time

import pipeinfer_dask as pi
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.trace import History
from pipeinfer_dask.widgets import DraftTree, Stepper, Timeline

target, draft = pi.demo_pair()
engine = pi.Engine.from_pretrained(target, draft=draft, stages=3, in_process=True)""",
    # The small models would share the cores, and wait for them most of the time. Stages of large
    # ones compute side by side; so each layer waits for as long as one of those takes.
    """LAYER_S, DRAFT_LAYER_S = 0.01, 0.003

def slower(stopped, seconds):
    def looked():
        time.sleep(seconds)
        return stopped()
    return looked

def run(shard, *batch, stopped, compute=Shard.run, **how):
    return compute(shard, *batch, stopped=slower(stopped, LAYER_S), **how)

def logits(shard, batch, picks, stopped, compute=Shard.logits, **how):
    return compute(shard, batch, picks, slower(stopped, DRAFT_LAYER_S), **how)

Shard.run, Shard.logits = run, logits""",
    f"board = engine.dashboard(prompt={PROMPT!r}, max_new_tokens=48)\nboard",
    f"""def generated(strategy):
    return engine.generate({PROMPT!r}, max_new_tokens=48, strategy=strategy)

plain, piped = generated("iterative"), generated("pipeinfer")
Stepper(plain, piped)""",
    "Timeline(piped)",
    """story = History(piped.trace)

def guessed(token):
    there = [g for g in story.guesses if g.ahead > 0 and g.made <= token.time < g.settled]
    depth = max((g.position for g in there), default=0) - token.guess.position
    return len(there) if depth <= 7 else 0  # deeper ones are wider than the picture

fullest = max(story.tokens, key=guessed)
DraftTree(piped, moment=fullest.time - story.began + 1e-4)""",
)
STEPS = 40
GUESSES = 8
"""So many at least are open where a dashboard's tree is shown: at the end there are none."""
SCROLL = ".pipeinfer-scroll"
IS_CUT = "it => it.scrollWidth > it.clientWidth"
IS_SMALL = "it => it.firstChild.viewBox?.baseVal.width > 1.15 * it.clientWidth"


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
        page.locator(".jp-Cell").nth(cell).locator(".jp-OutputArea-output").first
        for cell in range(2, 6)
    )
    tree.locator("[data-complete=true]").wait_for(timeout=600_000)
    board.get_by_label("Strategy").select_option("pipeinfer")
    board.locator(".jupyter-button[title=Run]").click()
    board.get_by_text("finished: 48 tokens").wait_for()
    board.locator("[data-bars][data-complete=true]").wait_for()
    step_back_to_a_tree(board)
    for _ in range(STEPS):
        stepper.get_by_role("button", name="A step ahead").click()
    for theme in ("Light", "Dark"):
        tab.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        save(board, f"dashboard-{theme.lower()}", theme)
        if theme == "Light":
            save(stepper, "stepper", theme)
            save(timeline, "timeline", theme)
            if tree.locator(SCROLL).first.evaluate(IS_CUT):
                raise SystemExit("the tree is wider than its picture: choose another moment")
            save(tree, "tree", theme)


def step_back_to_a_tree(board: Any) -> None:
    """Step back from the end until the tree has some guesses, and can be read."""
    tree = board.locator("[data-boxes]")
    back = board.get_by_role("button", name="A step back")
    while int(tree.get_attribute("data-open")) < GUESSES or tree.locator(SCROLL).first.evaluate(
        IS_SMALL
    ):
        drawn = tree.get_attribute("data-draws")
        back.click()
        tree.and_(board.page.locator(f":not([data-draws='{drawn}'])")).wait_for()


def save(output: Any, name: str, theme: str) -> None:
    output.scroll_into_view_if_needed()  # what nobody sees is not drawn
    output.locator(f"[data-theme]:not([data-theme={theme.lower()}])").first.wait_for(
        state="detached"
    )
    output.screenshot(path=IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
