"""Views in JupyterLab: what a student sees, clicks and saves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeinfer_dask.bench.browser import Lab, Tab
from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.simulation import simulate
from pipeinfer_dask.trace import Fate, History, Run
from pipeinfer_dask.trace.tables import work_of
from pipeinfer_dask.trace.text import ORIGINS
from tests.browser.conftest import Opened

pytestmark = pytest.mark.browser

SIMULATED = """
import pipeinfer_dask as pi
from pipeinfer_dask.widgets import *
simulation = pi.simulate("pipeinfer", stages=3, acceptance=0.6, max_new_tokens=80)
"""
SIMULATION = simulate("pipeinfer", stages=3, acceptance=0.6, max_new_tokens=80)
STORY = History(SIMULATION.trace)
SIMULATED_AT, LAYERS = STORY.began, STORY.layers
SIMULATED_TOOK = STORY.ended - STORY.began
SAVED = [work for done in STORY.done for work in work_of(done) if work.fate is Fate.SAVED]
MEANINGS = [ORIGINS[origin][2] for origin in Origin]
NOTE_TEXTS = """() => {
  const canvas = CanvasRenderingContext2D.prototype;
  const { clearRect, fillText } = canvas;
  canvas.clearRect = function (...where) {
    window.written = [];
    clearRect.apply(this, where);
  };
  canvas.fillText = function (text, x, y) {
    if (x > 62) window.written.push({ text, x, row: Math.floor((y - 16) / 26) });
    fillText.call(this, text, x, y);
  };
}"""
"""Notes what a timeline writes into its rows, each time that it is drawn."""
ENGINE = """
import pipeinfer_dask as pi
from pipeinfer_dask.widgets import *
from pipeinfer_dask.models.demo_pair import demo_pair
target, draft = demo_pair()
engine = pi.Engine.from_pretrained(target, draft=draft, stages=2, in_process=True)
"""
SLOW = """
import time
from pipeinfer_dask.models.shard import Shard
at_once = Shard.run

def run(*args, **options):
    time.sleep(0.05)
    return at_once(*args, **options)

Shard.run = run
"""
"""So that a text takes longer than a browser to click, however busy the machine is."""
AWAIT = """
import asyncio
begun = asyncio.Event()
board.controls.status.observe(lambda _: begun.set(), "value")
if board.generation is None:
    await begun.wait()
result = await board.generation
print("awaited:", result.finish_reason)
"""
EVIL = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"


def data(tab: Tab, selector: str) -> dict[str, str]:
    found = tab.page.locator(selector).first.evaluate("element => ({...element.dataset})")
    assert isinstance(found, dict)
    return found


def rows_of(tab: Tab, table: str) -> list[list[str]]:
    """Return the cells of a table's body, once it is there."""
    tab.page.locator(table).locator("td").first.wait_for()
    rows = tab.page.locator(table).evaluate(
        "table => [...table.tBodies[0].rows].map(row => [...row.cells].map(it => it.innerText))"
    )
    assert isinstance(rows, list)
    return rows


def until(tab: Tab, selector: str, condition: str) -> dict[str, str]:
    """Wait until a view says so of itself: ``condition`` is JavaScript over its ``data``."""
    tab.page.wait_for_function(
        f"""selector => {{
          const data = document.querySelector(selector)?.dataset;
          return data && ({condition});
        }}""",
        arg=selector,
    )
    return data(tab, selector)


def test_a_timeline_shows_every_bar_and_can_be_moved_about(opened: Opened) -> None:
    tab = opened(SIMULATED, "Timeline(simulation)")
    page = tab.page
    all_bars = sum(1 for done in STORY.done for _ in work_of(done))
    begin = until(tab, "[data-bars]", "data.complete === 'true'")
    assert int(begin["bars"]) == all_bars
    assert int(begin["tokens"]) == 80
    page.get_by_text("ring, nothing computed: saved by calling off").first.wait_for()
    assert 0 < int(begin["drawn"]) < all_bars

    def seen(values: dict[str, str]) -> float:
        return float(values["to"]) - float(values["from"])

    page.get_by_role("button", name="Show all").click()
    whole = until(tab, "[data-bars]", f"data.drawn === '{all_bars}'")
    canvas = page.locator(".pipeinfer canvas[tabindex]")
    box = canvas.bounding_box()
    assert box is not None
    assert int(whole["rings"]) == len(SAVED) > 0
    for work in SAVED[:2]:  # where a bar begins and ends, too: the ring is meant
        per_s = (box["width"] - 68) / seen(whole)
        at = 62 + (work.span.began - SIMULATED_AT) * per_s
        page.mouse.move(box["x"] + at, box["y"] + 16 + 26 * (work.row + 0.5))
        told = page.locator(".pipeinfer-tip").inner_text()
        assert told.startswith(f"stage {work.row - 1}, run ") and Fate.SAVED.meaning in told
        assert f"0 layers computed, {LAYERS[work.row - 1]} saved by calling off" in told
    canvas.hover()
    page.mouse.wheel(0, -200)  # it has no focus: the page scrolls, the picture stays
    canvas.click()
    page.mouse.wheel(0, -200)
    wheeled = until(tab, "[data-bars]", f"data.to !== '{whole['to']}'")
    assert seen(wheeled) == pytest.approx(0.8 * seen(whole), rel=0.01)

    page.keyboard.press("+")
    zoomed = until(tab, "[data-bars]", f"data.to !== '{wheeled['to']}'")
    assert seen(zoomed) == pytest.approx(0.5 * seen(wheeled), rel=0.01)
    page.keyboard.press("ArrowRight")
    moved = until(tab, "[data-bars]", f"data.from !== '{zoomed['from']}'")
    assert float(moved["from"]) > float(zoomed["from"])
    page.evaluate(NOTE_TEXTS)
    page.keyboard.press("+")
    near = until(tab, "[data-bars]", f"data.to !== '{moved['to']}'")
    scale = (canvas.evaluate("it => it.clientWidth") - 68) / seen(near)  # pixels a second
    bars = {}
    for run in STORY.runs.values():
        left, right = (
            62 + (time - SIMULATED_AT - float(near["from"])) * scale
            for time in (run.spans[0].began, run.spans[0].ended)
        )
        if right > 62 and left < 62 + seen(near) * scale:
            bars[run.id] = left, right
    in_row = page.evaluate("window.written.filter(({row}) => row === 1)")
    numbers = {int(each["text"]): each["x"] for each in in_row if each["text"].isdigit()}
    assert all(bars[run][0] < x < bars[run][1] for run, x in numbers.items())
    wide = {run for run, (left, right) in bars.items() if right - max(left, 62) > 30}
    assert len(wide) > 5 and wide <= set(numbers)
    assert page.get_by_text("a number: which run; behind it, its text").is_visible()
    page.keyboard.press("0")
    until(tab, "[data-bars]", f"data.drawn === '{all_bars}'")

    page.mouse.move(box["x"] + 70, box["y"] + 16 + 26 + 13)
    until(tab, "[data-bars]", "data.focused !== undefined && data.focused !== '-1'")
    assert "stage 0, run 0: reading the prompt" in page.locator(".pipeinfer-tip").inner_text()

    page.keyboard.press("ArrowDown")  # from bar to bar by keys: each is said
    status = page.locator(".pipeinfer [role=status]")
    first = status.inner_text()
    assert first.startswith("drafter, draft ")
    page.keyboard.press("ArrowDown")
    assert status.inner_text().startswith("stage 0, run ")
    before = status.inner_text()
    page.keyboard.press("Shift+ArrowRight")
    assert status.inner_text().startswith("stage 0, run ") and status.inner_text() != before
    page.locator(".pipeinfer").get_by_text("The bars in view as a table").click()
    page.locator(".pipeinfer td").get_by_text("stage 0, run 0: reading the prompt").wait_for()

    canvas.focus()
    page.keyboard.press("Escape")
    assert status.inner_text() == ""
    page.keyboard.press("+")
    near = until(tab, "[data-bars]", f"Number(data.to) - Number(data.from) < {0.6 * seen(whole)}")
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 400, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 50)
    page.mouse.up()
    dragged = until(tab, "[data-bars]", f"data.from !== '{near['from']}'")
    assert seen(dragged) == pytest.approx(seen(near), rel=0.001)
    shift = 100 * seen(near) / (box["width"] - 68)
    assert float(dragged["from"]) - float(near["from"]) == pytest.approx(shift, rel=0.05)
    page.keyboard.press("Home")
    until(tab, "[data-bars]", "data.from === '0.000000' && data.follow === 'false'")
    page.keyboard.press("f")
    followed = until(tab, "[data-bars]", "data.follow === 'true'")
    assert float(followed["from"]) < SIMULATED_TOOK < float(followed["to"])


def test_a_timeline_follows_the_theme_and_says_the_same_as_a_table(opened: Opened) -> None:
    tab = opened(SIMULATED, "Timeline(simulation)")
    until(tab, "[data-bars]", "data.theme === 'light'")
    tab.command("apputils:change-theme", theme="JupyterLab Dark")
    until(tab, "[data-bars]", "data.theme === 'dark'")
    tab.command("apputils:change-theme", theme="JupyterLab Light")
    until(tab, "[data-bars]", "data.theme === 'light'")
    tab.page.locator(".pipeinfer").get_by_text("The same as a table").click()
    rows = tab.page.locator(".pipeinfer tbody tr")
    rows.first.wait_for()
    assert rows.all_inner_texts()[1].split("\t")[0] == "stage 0"
    head = tab.page.locator(".pipeinfer thead th").all_inner_texts()
    told = [int(row.split("\t")[head.index(Fate.SAVED.meaning)]) for row in rows.all_inner_texts()]
    assert told == [sum(work.row == row for work in SAVED) for row in range(4)]
    label = tab.page.locator(".pipeinfer canvas[role=application]").get_attribute("aria-label")
    assert label is not None and "bars of 4 nodes" in label


def test_a_dashboard_runs_and_cancels_a_generation_while_a_cell_awaits_it(opened: Opened) -> None:
    board = "board = engine.dashboard(max_new_tokens=400)\nboard"
    tab = opened(ENGINE + SLOW, board, AWAIT, wait=False)
    page = tab.page
    run, cancel = (page.locator(f".jupyter-button[title={name}]") for name in ("Run", "Cancel"))
    run.wait_for(timeout=240_000)  # the engine is being opened
    assert cancel.is_disabled()
    run.click()
    live = until(tab, "[data-bars]", "Number(data.bars) > 20")
    assert live["complete"] == "false"
    cancel.click()
    page.get_by_text(re.compile(r"stopped: \d+ tokens")).wait_for()
    page.get_by_text("awaited: stopped", exact=True).wait_for()
    ended = until(tab, "[data-bars]", "data.complete === 'true'")
    tokens = int(ended["tokens"])
    assert 0 < tokens < 400
    for selector in (".pipeinfer[data-struck]", ".pipeinfer[data-speed]"):
        until(tab, selector, f"data.complete === 'true' && data.tokens === '{tokens}'")
    until(tab, ".pipeinfer[data-boxes]", "data.complete === 'true'")
    assert run.is_enabled()
    # What colours, lines and charts say is said in words, too.
    page.locator("[data-speed] summary").click()
    figures = dict(rows_of(tab, "[data-speed] table >> nth=0"))
    assert float(figures["tokens a second"]) == pytest.approx(
        float(data(tab, "[data-speed]")["speed"]), abs=0.06
    )
    assert rows_of(tab, "[data-speed] table >> nth=1")[-1][1] == str(tokens)
    nodes = rows_of(tab, "[data-speed] table >> nth=3")
    assert [name for name, _ in nodes] == ["drafter", "stage 0", "stage 1"]
    page.locator("[data-struck] summary").click()
    stretches = rows_of(tab, "[data-struck] table")
    assert stretches[-1][0].split(" to ")[-1] == str(tokens)
    assert {origin for _, _, origin, _ in stretches} <= set(MEANINGS)
    said = page.get_by_role("group", name="Generated text").get_attribute("aria-description")
    (_, *counts), (_, *meanings) = zip(*re.findall(r"(\d+) ([^;]+)", said or ""), strict=True)
    assert meanings == MEANINGS and sum(map(int, counts)) == tokens
    page.get_by_label("Knobs").fill("micro_batch=zero")
    page.get_by_label("Knobs").blur()
    run.click()
    page.get_by_text("Not started: expected knobs as name=value").wait_for()


def test_a_view_that_is_opened_later_has_all_rows(opened: Opened) -> None:
    tab = opened(
        ENGINE,
        "generation = engine.start('def main', max_new_tokens=150)\n"
        "timeline = Timeline(generation)\ntimeline",
        "next(iter(generation))\ntimeline",
    )
    tab.page.locator("[data-complete=true]").nth(1).wait_for()
    first, second = (
        tab.page.locator("[data-bars]").nth(at).evaluate("element => element.dataset.bars")
        for at in range(2)
    )
    assert first == second
    assert int(first) > 50
    until(tab, "[data-steps]", "Number(data.steps) > 50")  # it is over: each has a clock
    begin, further = tab.page.get_by_role("button", name="To the start"), "Number(data.drawn) > 3"
    until(tab, "[data-bars]", further)
    begin.nth(1).click()
    until(tab, "[data-bars]", "data.drawn === '0'")
    tab.page.get_by_role("slider", name="Moment").first.press("ArrowUp")
    tab.page.get_by_role("button", name="To the end").first.click()
    until(tab, "[data-bars]", further)


def test_a_stepper_shows_strategies_on_one_clock(opened: Opened) -> None:
    tab = opened(SIMULATED, "Stepper(pi.simulate('iterative', stages=3), simulation)")
    page = tab.page
    clock = until(tab, "[data-steps]", "Number(data.steps) > 100")
    assert float(clock["moment"]) == 0
    ahead = page.get_by_role("button", name="A step ahead")
    for _ in range(40):
        ahead.click()
    moment = float(data(tab, "[data-steps]")["moment"])
    assert moment > 0
    texts = page.locator(".pipeinfer[data-struck]")
    plain, piped = (int(texts.nth(at).get_attribute("data-tokens") or 0) for at in range(2))
    assert 0 < plain < piped < 80
    page.get_by_role("button", name="Play or pause").click()
    until(tab, "[data-steps]", f"data.playing === 'true' && Number(data.moment) > {moment}")
    page.get_by_role("button", name="Play or pause").click()
    until(tab, "[data-steps]", "data.playing === 'false'")
    page.get_by_role("button", name="To the end").click()
    tab.page.wait_for_function(
        "() => [...document.querySelectorAll('[data-struck]')].map(e => e.dataset.tokens).join()"
        " === '200,80'"
    )


def test_where_a_text_has_no_room_its_letters_are_written_and_not_the_spaces_before(
    opened: Opened,
) -> None:
    words = "trace = simulation.trace\ntrace.texts = dict.fromkeys(range(99), '    return')\n"
    tab = opened(SIMULATED, words + "trace.pieces = []\nTimeline(trace)")
    until(tab, "[data-bars]", "data.complete === 'true'")
    tab.page.evaluate(NOTE_TEXTS)
    draws = data(tab, "[data-bars]")["draws"]
    tab.page.get_by_role("button", name="Show all").click()
    until(tab, "[data-bars]", f"Number(data.draws) > {draws}")
    texts = tab.page.evaluate("window.written.filter(({row}) => row === 4).map(({text}) => text)")
    written = {text for text in texts if text and not text.isdigit()}
    assert written and all(text.startswith("r") for text in written - {"␣␣␣␣return"})


SEEN = """() => [...document.querySelectorAll("[data-bars]")].map(
  ({ dataset }) => `${dataset.from} ${dataset.to}`)"""


def test_the_timelines_of_a_stepper_share_a_legend_buttons_and_a_clock_that_stays_in_view(
    opened: Opened,
) -> None:
    tab = opened(
        SIMULATED,
        "Stepper(*(pi.simulate(name, stages=3) for name in ('iterative', 'speculative')),"
        " simulation, tree=True)",
    )
    page = tab.page
    page.wait_for_function("() => document.querySelectorAll('[data-bars]').length === 3")
    until(tab, "[data-steps]", "Number(data.steps) > 100")
    for text in ("empty: idle", "hollow, dashed: still open"):
        assert page.locator(".pipeinfer").get_by_text(text).count() == 1
    zoom = page.get_by_role("button", name="Zoom in")
    assert zoom.count() == 1

    def all_turn_to_another_part(seen: list[str]) -> list[str]:
        page.wait_for_function(
            f"before => {{ const now = ({SEEN})(); return new Set(now).size === 1"
            " && now[0] !== before; }",
            arg=seen[0],
        )
        after: list[str] = page.evaluate(SEEN)
        return after

    seen = page.evaluate(SEEN)
    assert len(seen) == 3 and len(set(seen)) == 1
    zoom.click()
    seen = all_turn_to_another_part(seen)
    page.get_by_role("button", name="To the end").click()  # of the slowest: all have its moment
    seen = all_turn_to_another_part(seen)
    assert float(seen[0].split()[1]) > float(data(tab, "[data-steps]")["moment"])

    page.set_viewport_size({"width": 1200, "height": 600})
    clock = page.locator(".pipeinfer-clock")
    page.wait_for_function(  # what comes into sight is drawn, and may need more room
        """() => {
          const last = [...document.querySelectorAll("[data-boxes]")].at(-1);
          last.scrollIntoView({ block: "end" });
          return last.getBoundingClientRect().bottom < innerHeight;
        }"""
    )
    assert clock.evaluate(
        """it => [...it.querySelectorAll("button, input, select")].every(part => {
          const { left, top, width, height } = part.getBoundingClientRect();
          return part.contains(document.elementFromPoint(left + width / 2, top + height / 2));
        })"""
    )
    page.get_by_role("button", name="To the start").click()
    until(tab, "[data-steps]", "Number(data.moment) === 0")


def test_what_a_reader_chose_in_any_timeline_of_a_stepper_stays_when_a_busy_kernel_answers(
    opened: Opened, lab: Lab
) -> None:
    tab = opened(
        SIMULATED,
        "Stepper(*(pi.simulate(name, stages=3) for name in ('iterative', 'speculative')),"
        " simulation)",
        "import os\nos.mkfifo('go')\nprint('he' 'ld', flush=True)\nopen('go').read()",
        "print('answ' 'ered')",
        wait=False,
    )
    page = tab.page
    page.get_by_text("held", exact=True).wait_for()  # it hears nothing until it may go on
    page.wait_for_function("() => document.querySelectorAll('[data-bars]').length === 3")
    lengths = "(" + SEEN + ")().map(seen => seen.split(' ')).map(([from, to]) => to - from)"
    (whole,) = set(page.evaluate(lengths))
    page.get_by_role("button", name="Zoom in").click()
    page.wait_for_function(f"whole => {lengths}.every(each => each < whole)", arg=whole)
    page.get_by_role("application").nth(2).focus()
    page.keyboard.press("-")
    page.keyboard.press("-")
    page.wait_for_function(f"whole => {lengths}.every(each => each > whole)", arg=whole)
    seen = page.evaluate(SEEN)
    assert len(seen) == 3 and len(set(seen)) == 1
    (lab.notebooks / "go").write_text("")
    page.get_by_text("answered", exact=True).wait_for()  # behind what it says of the views
    page.evaluate("() => new Promise(requestAnimationFrame)")  # what it changes is drawn
    assert page.evaluate(SEEN) == seen


def test_a_run_that_is_stepped_past_looks_open_until_it_is_decided(opened: Opened) -> None:
    works = [work for done in STORY.done for work in work_of(done)]
    run = next(
        work.of for work in works if work.fate is Fate.CANCELLED and isinstance(work.of, Run)
    )
    assert run.decided is not None
    moment = run.decided - 1e-4
    then = [work for work in works if work.span.began <= moment and work.open_at(moment)]
    tab = opened(
        SIMULATED,
        f"timeline = Timeline(simulation, moment={moment - SIMULATED_AT!r})\ntimeline",
        "timeline.freeze()",
    )
    page = tab.page
    page.get_by_role("button", name="Show all").click()
    shown = until(tab, "[data-bars]", f"data.open === '{len(then)}'")
    at_once = next(work for work in then if work.of is run)
    box = page.locator(".pipeinfer canvas[tabindex]").bounding_box()
    assert box is not None
    scale = (box["width"] - 68) / (float(shown["to"]) - float(shown["from"]))
    middle = (at_once.span.began + min(at_once.span.ended, moment)) / 2 - SIMULATED_AT
    page.mouse.move(box["x"] + 62 + middle * scale, box["y"] + 16 + 26 * (at_once.row + 0.5))
    told = page.locator(".pipeinfer-tip").inner_text()
    assert told.startswith(f"stage {at_once.row - 1}, run ") and "still open" in told
    assert "called off" not in told and "of them text" not in told
    page.locator(".pipeinfer").get_by_text("The same as a table").click()
    page.locator("[data-bars] td").first.wait_for()  # a table is filled when it is open
    head, *rows = page.locator("[data-bars] tr").all_inner_texts()
    place = head.split("\t").index("still open")
    assert [int(row.split("\t")[place]) for row in rows] == [
        sum(work.row == row for work in then) for row in range(4)
    ]
    frozen = page.locator("img[alt*='as it was at'] >> visible=true")
    assert frozen.count() == 1
    page.get_by_role("button", name="To the end").click()
    until(tab, "[data-bars]", "data.open === '0'")


def test_every_control_is_reached_by_tab_and_a_stepper_worked_by_keys(opened: Opened) -> None:
    tab = opened(SIMULATED, "Stepper(simulation, tree=True)")
    page = tab.page
    until(tab, "[data-steps]", "Number(data.steps) > 100")
    until(tab, "[data-boxes]", "data.complete === 'true'")

    def moment() -> float:
        return float(data(tab, "[data-steps]")["moment"])

    page.get_by_role("button", name="To the start").focus()
    reached = []
    for _ in range(21):
        reached.append(
            page.evaluate(
                "() => { const at = document.activeElement;"
                " return at.ariaLabel ?? at.labels?.[0]?.textContent ?? at.textContent; }"
            )
        )
        if reached[-1] == "A step ahead":
            for _ in range(3):
                page.keyboard.press("Enter")
            stepped = moment()
            assert stepped > 0
        elif reached[-1] == "Moment":
            page.keyboard.press("ArrowRight")
            assert moment() > stepped
            page.keyboard.press("ArrowLeft")
            assert moment() == stepped
            page.keyboard.press("End")
            page.keyboard.press("Home")
            assert moment() == 0
        page.keyboard.press("Tab")
    assert reached[:7] == [
        *("To the start", "A step back", "Play or pause", "A step ahead", "To the end"),
        *("Moment", "Speed"),
    ]
    assert reached[7].startswith("Timeline: ")
    assert reached[8:14] == [
        *("Zoom in", "Zoom out", "Earlier", "Later", "Show all", "Keep the newest in sight")
    ]
    assert reached[14:] == [
        *("The same as a table", "The bars in view as a table", "Generated text"),
        *(" show rejected guesses, struck through", "The same as a table", "Draft tree"),
        "The same as a table",
    ]


def test_a_tree_is_seen_in_full_and_says_of_each_guess_what_it_is(opened: Opened) -> None:
    tab = opened(SIMULATED, "DraftTree(simulation, moment=2.0)")
    shown = until(tab, "[data-boxes]", "Number(data.boxes) > 3")
    cut = "it => it.scrollWidth > it.clientWidth"
    assert not tab.page.locator(".pipeinfer-scroll").first.evaluate(cut)
    items = tab.page.get_by_role("listitem").filter(has=tab.page.locator("rect"))
    said = [item.get_attribute("aria-label") or "" for item in items.all()]
    assert len(said) == int(shown["boxes"])
    assert re.fullmatch(r"#\d+: text", said[0])
    guess = (
        r"#\d+: (a guess, the target is asked|only guessed|ruled out just now), \d+%, after #\d+"
    )
    assert sum(bool(re.fullmatch(guess, each)) for each in said) >= int(shown["open"])
    tab.page.locator(".pipeinfer").get_by_text("The same as a table").click()
    rows = tab.page.locator(".pipeinfer-scroll tbody tr")
    rows.first.wait_for()
    guesses = [each for each in said if ": text" not in each]
    told = [" ".join(row.locator("td").all_inner_texts()) for row in rows.all()]
    assert len(told) == len(guesses)
    for line, each in zip(told, guesses, strict=True):
        parts = re.fullmatch("(.*): (.*), (.*), after (.*)", each)
        assert parts is not None
        word, kind, sure, after = parts.groups()
        assert line.startswith(f"{word} {after} {kind} {sure}")
    assert float(data(tab, "[data-steps]")["moment"]) == 2
    tab.page.get_by_role("button", name="A step ahead").click()
    assert until(tab, "[data-boxes]", f"data.draws > {shown['draws']}") != shown
    tab.page.get_by_role("button", name="To the start").click()
    until(tab, "[data-boxes]", "data.boxes === '0' && data.open === '0'")


def pictures_of(notebook: Path) -> list[str]:
    """Return what a saved notebook holds for pages that can't run its views."""
    outputs = [out for cell in json.loads(notebook.read_text())["cells"] for out in cell["outputs"]]
    return ["".join(out["data"]["text/html"]) for out in outputs if "text/html" in out["data"]]


def test_a_notebook_saved_with_live_views_holds_pictures_of_them(
    opened: Opened, lab: Lab, browser: Any
) -> None:
    tab = opened(
        ENGINE,
        "generation = engine.start('def main', max_new_tokens=60)\nTimeline(generation)",
        "board = engine.dashboard()\nboard",
        "board.show(generation)",
        "Metrics(generation.result())",
    )
    page = tab.page
    page.wait_for_function("() => document.querySelectorAll('[data-complete=true]').length === 6")
    # While the views live, their pictures are there and hidden.
    page.wait_for_function("() => document.querySelectorAll('.jp-OutputArea img').length >= 2")
    assert not page.locator("[class^=pipeinfer-picture]").filter(visible=True).count()
    tab.command("docmanager:save")
    (saved,) = lab.notebooks.glob("test_a_notebook_saved*.ipynb")
    timeline, board, metrics = pictures_of(saved)
    assert "data:image/svg+xml;base64," in timeline and "tokens a second" in metrics
    assert "tokens a second" in board and "guessed by the draft model" in board
    assert len(timeline) < 100_000
    with exported(saved, browser) as page:
        images = page.locator(".jp-OutputArea-output img:not([alt=''])").all()
        kinds = [(image.get_attribute("alt") or "").split(" ")[0] for image in images]
        assert kinds.count("Timeline:") == 2 and kinds.count("Draft") == 1
        assert kinds.count("Guesses") == 4  # over time and by depth, of the board and by themselves
        assert all(image.is_visible() for image in images)
        assert page.get_by_text("tokens a second").first.is_visible()
    tab.end_kernel()
    tab.open(lab.address_of(saved.name))
    images = tab.page.locator("[class^=pipeinfer-picture] img[alt^=Timeline]")
    images.first.wait_for()
    assert [images.nth(at).is_visible() for at in range(images.count())] == [True, True]


def test_what_a_model_says_can_do_nothing_in_a_page(opened: Opened) -> None:
    tab = opened(
        SIMULATED,
        f"trace = simulation.trace\ntrace.texts = dict.fromkeys(range(99), {EVIL!r})\n"
        "board = [TokenStream(trace), DraftTree(trace, moment=2.0), Timeline(trace)]\n"
        "import ipywidgets\nipywidgets.VBox(board)",
        "from IPython.display import display\ndisplay(simulation, trace)\n"
        "display(*(view.freeze() for view in board))",
    )
    until(tab, ".pipeinfer[data-boxes]", "Number(data.boxes) > 3")
    tab.page.get_by_label("show rejected guesses").check()
    until(tab, ".pipeinfer[data-struck]", "Number(data.struck) > 0")
    assert tab.page.evaluate("window.hacked") is None
    assert tab.page.locator("img[src=x]").count() == 0


def test_a_frozen_picture_is_in_the_saved_notebook_and_in_what_is_made_of_it(
    opened: Opened, lab: Lab, browser: Any
) -> None:
    tab = opened(
        SIMULATED,
        "Timeline(simulation).freeze()",
        "simulation",
        "Stepper(simulation, tree=True).freeze()",
    )
    tab.page.locator(".jp-OutputArea-output img").first.wait_for()
    tab.command("docmanager:save")
    (saved,) = lab.notebooks.glob("test_a_frozen*.ipynb")
    outputs = [cell["outputs"] for cell in json.loads(saved.read_text())["cells"][1:]]
    for (output,) in outputs:
        assert "data:image/svg+xml;base64," in "".join(output["data"]["text/html"])
    with exported(saved, browser) as page:
        pictures = page.locator(".jp-OutputArea-output img:not([alt=''])")
        kinds = [(each.get_attribute("alt") or "").split(" ")[0] for each in pictures.all()]
        assert kinds == ["Timeline:", "Timeline:", "Timeline:", "Draft"]
        letters = page.locator("pre[style] span").first
        assert letters.evaluate("it => getComputedStyle(it).fontFamily") == "monospace"
        for number in range(3):
            box = pictures.nth(number).bounding_box()
            assert box["width"] > 300 and box["height"] > 80
        assert pictures.nth(3).is_visible()


@contextmanager
def exported(notebook: Path, browser: Any) -> Iterator[Any]:
    """Yield the page that nbconvert makes of a notebook, without scripts and without a network."""
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--embed-images", str(notebook)]
    subprocess.run(command, check=True, capture_output=True)
    context = browser.new_context(java_script_enabled=False)
    asked: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.route(re.compile("^https?:"), lambda route: route.abort())
    page.goto(notebook.with_suffix(".html").as_uri())
    yield page
    context.close()
    # What nbconvert's own page asks for, whatever is in it, are scripts: none runs here.
    assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
