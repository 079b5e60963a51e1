"""The picture of characters."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from pipeinfer_dask.protocol.messages import RunDone
from pipeinfer_dask.simulation import Costs, simulate
from pipeinfer_dask.timeline import Sign, draw, legend, show, window
from pipeinfer_dask.trace import Fate, History, Run, Trace
from pipeinfer_dask.trace.tables import node_name, work_of

PLAIN_COSTS = Costs.even(3, stage_s=1.0, hop_cost=0.0)
PLAIN = simulate("iterative", costs=PLAIN_COSTS, prompt_tokens=1, max_new_tokens=8)


def signs(source: Any, columns: int, part: tuple[float, float] | None = None) -> Text:
    """Draw so many signs behind the names."""
    return draw(source, len("drafter ") + columns, part)


def rows(picture: str) -> dict[str, str]:
    lines = picture.splitlines()
    label = len("drafter") + 1
    return {line[:label].strip(): line[label:] for line in lines}


def test_plain_decoding_keeps_one_stage_busy_at_a_time() -> None:
    picture = rows(signs(PLAIN.trace, 12, (3.0, 9.0)).plain)
    assert picture == {
        "drafter": "............",
        "stage 0": "##....##....",
        "stage 1": "..##....##..",
        "stage 2": "....##....##",
        "cancels": "            ",
        "tokens": "1     1     ",
    }


def test_the_prompt_is_shown_as_such() -> None:
    assert rows(signs(PLAIN.trace, 6, (0.0, 3.0)).plain)["stage 0"] == "==...."


def test_speculation_is_shown_by_what_it_came_to() -> None:
    trace = simulate("pipeinfer", stages=4, acceptance=0.6).trace
    picture = rows(signs(trace, 100).plain)
    assert {"#", "+", "x"} <= set(picture["stage 0"])
    assert "~" in picture["drafter"]


def test_runs_that_were_called_off_at_once_are_counted_below_the_stages() -> None:
    trace = simulate("pipeinfer", stages=4, acceptance=0.6).trace
    waves = History(trace).waves
    began, ended = waves[0].time - 0.01, waves[0].time + 0.01
    picture = rows(signs(trace, 20, (began, ended)).plain)
    assert picture["cancels"].strip() == str(len(waves[0].runs))
    assert picture["cancels"].index(picture["cancels"].strip()) == 10


def test_what_calling_off_has_saved_a_stage_is_seen_where_it_was_idle() -> None:
    trace = simulate("pipeinfer", stages=3, acceptance=0.4, max_new_tokens=10).trace
    history = History(trace)
    works = [work for done in history.done for work in work_of(done)]
    saved = [work for work in works if work.fate is Fate.SAVED]
    assert saved
    columns, picture = 400, rows(signs(trace, 400, (0.0, history.ended + 1e-6)).plain)
    seen = 0
    for row in range(1, trace.stages + 1):
        line = picture[node_name(row)]
        places = {
            int(work.span.began / (history.ended + 1e-6) * columns)
            for work in saved
            if work.row == row
        }
        assert {at for at, sign in enumerate(line) if sign == "o"} <= places
        assert all(line[at] != "." for at in places)
        seen += line.count("o")
    assert seen > 0


PICTURE = """
drafter ~~~~.....~~.......~.~......~~~......~~~~.~~~.~..~~~.~.~.~...~~...~.~.~
stage 0 ##++xxxxx##++xxxxx##+++xxxx##+++xxxxx##++++xxxxx##xxxx##xxxx##+++xxxxx
stage 1 ..##+++xxo.##+++xxo.##+++xxo.###++xxx..##++++xxx..##xxo.##xxx..##++xxx
stage 2 ....##.++o...##.++o...##.++x...##.+++....##+++++o...##o...##o....##+++
cancels          4        4        4        4          4      3     3        4
tokens  1     1  2     1  2     1  1     1  1     1  2 2      1     1     1  1
"""
"""Of what the strategy does today: where that changes, look at the new one, and save it here."""


def test_a_picture_is_as_it_was_saved_sign_by_sign() -> None:
    trace = simulate("pipeinfer", stages=3, acceptance=0.4, max_new_tokens=30, seed=3).trace
    lines = signs(trace, 70).plain.splitlines()
    assert [line.rstrip() for line in lines] == PICTURE.strip().splitlines()


@pytest.mark.parametrize("width", [80, 133])
def test_pictures_of_several_strategies_have_one_scale_and_fit_a_plain_terminal(width: int) -> None:
    shown = StringIO()
    console = Console(file=shown, width=width, no_color=True, force_terminal=True)
    traces = [
        (name, simulate(name, costs=PLAIN_COSTS, prompt_tokens=1, max_new_tokens=60).trace)
        for name in ("iterative", "pipeinfer")
    ]
    show(console, traces)
    text = Text.from_ansi(shown.getvalue()).plain
    assert max(map(len, text.splitlines())) <= width
    plain, quick = (
        rows(part[part.index("\n") + 1 :]) for part in re.split("^[a-z]+ ─", text, flags=re.M)[1:]
    )
    assert plain["stage 0"].startswith("##....##....")  # a column is half a run, in both of them
    assert len(plain["stage 0"].rstrip()) == len(quick["stage 0"].rstrip()) == width - 10
    began, ended = window(traces[0][1], width - 10)
    last = max(History(trace).ended for _, trace in traces)
    part = f"shows {1e3 * (ended - began):.0f} ms; the longest text took {1e3 * last:.0f} ms."
    assert part in " ".join(text.split())
    for sign in Sign:
        assert (f"{sign.character} {sign.meaning}" in text) is (sign is not Sign.OPEN)
    codes = {
        code
        for found in re.findall(r"\x1b\[([\d;]*)m", shown.getvalue())
        for code in found.split(";")
    }
    assert codes <= {"", "0", "1", "2"}  # bold and dim are no colours


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
@pytest.mark.parametrize("columns", [1, 20, 133])
def test_every_row_is_as_wide_as_was_asked_for(strategy: str, columns: int) -> None:
    trace = simulate(strategy, stages=2, max_new_tokens=30).trace
    picture = rows(signs(trace, columns).plain)
    assert {len(row) for row in picture.values()} == {columns}


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("stages", [2, 11])
def test_picture_and_legend_fit_the_columns(columns: int, stages: int) -> None:
    trace = simulate("pipeinfer", stages=stages, max_new_tokens=60).trace
    assert {len(line) for line in draw(trace, columns).plain.splitlines()} == {columns}
    assert max(map(len, legend(columns).plain.splitlines())) <= columns
    assert max(map(len, legend().plain.splitlines())) <= 80


def test_guesses_that_were_all_wrong_are_told_from_those_that_were_not() -> None:
    trace = simulate("speculative", stages=2, acceptance=0.5).trace
    assert {"+", "-"} <= set(rows(signs(trace, 200).plain)["stage 0"])


def test_of_a_text_that_goes_on_a_run_that_is_not_decided_yet_is_drawn_as_open() -> None:
    whole = simulate("speculative", stages=3, acceptance=0.6, max_new_tokens=30).trace
    told = iter(whole)
    trace = Trace(3)
    for time, what in told:  # until a run is back, and not yet its tokens
        trace.add(time, what)
        if isinstance(what, RunDone) and History(trace).runs[what.run].fate is None:
            break
    history = History(trace)
    run, until = history.done[-1], history.ended
    assert isinstance(run, Run) and run.guesses
    began = run.spans[-1].began
    assert set(rows(signs(trace, 10, (began, until)).plain)["stage 2"]) >= {"?"}
    shown = StringIO()
    show(Console(file=shown, width=100), [("to its end", whole), ("going on", trace)])
    assert "? still open" in shown.getvalue()
    for time, what in told:
        trace.add(time, what)
    assert "?" not in signs(trace, 10, (began, until)).plain


def test_the_window_begins_with_the_first_token_and_ends_with_the_last() -> None:
    began, ended = window(PLAIN.trace, 1000)
    assert began == pytest.approx(3.0)
    assert ended == pytest.approx(24.0)


def test_an_empty_trace_is_an_empty_picture() -> None:
    picture = rows(signs(type(PLAIN.trace)(2), 10).plain)
    assert set("".join(picture.values())) <= {".", " "}


def test_whatever_has_a_trace_can_be_drawn_and_nothing_else() -> None:
    assert draw(PLAIN, 12).plain == draw(PLAIN.trace, 12).plain
    assert window(PLAIN, 12) == window(PLAIN.trace, 12)
    with pytest.raises(ValueError, match="expected a trace, or a generation, result or simulation"):
        window("trace.json", 12)
    with pytest.raises(ValueError, match="expected a trace, or a generation, result or simulation"):
        draw("trace.json", 12)
    with pytest.raises(ValueError, match="expected columns as a whole number of at least 1, got 0"):
        draw(PLAIN, 0)
    with pytest.raises(ValueError, match=r"expected columns as a whole number .* got 'wide'"):
        draw(PLAIN, "wide")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"part as two times in seconds, \(from, to\), got 3"):
        draw(PLAIN, 12, 3)  # type: ignore[arg-type]


def test_of_a_long_pipeline_both_ends_are_drawn() -> None:
    lines = signs(simulate("iterative", stages=100, max_new_tokens=2), 20).plain.splitlines()
    assert len(lines) == 32 + 3  # what is left out, the cancels and the tokens
    assert lines[16] == "(69 stages more)"
    assert [line.split()[1] for line in (lines[15], lines[17], lines[-3])] == ["14", "84", "99"]


def test_no_sign_means_two_things_and_each_is_explained() -> None:
    assert len({sign.character for sign in Sign}) == len(Sign)
    for sign in Sign:
        assert f"{sign.character} {sign.meaning}" in legend().plain
