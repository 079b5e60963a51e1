"""Traces for other programs: pandas, and pages without scripts."""

from __future__ import annotations

import base64
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeinfer_dask.protocol.messages import Drafted, RunDone
from pipeinfer_dask.simulation import simulate
from pipeinfer_dask.timeline import draw
from pipeinfer_dask.trace import Fate, History, Run, Trace
from pipeinfer_dask.trace.picture import (
    comparison_html,
    result_html,
    timeline_html,
    timeline_svg,
    trace_html,
)
from pipeinfer_dask.trace.record import Rows
from pipeinfer_dask.trace.tables import row_names, work_of
from pipeinfer_dask.widgets import Channel

TRACE = simulate("pipeinfer", stages=3, acceptance=0.6, max_new_tokens=60).trace
EVIL = "</pre><script>alert('1')</script>&"


def test_a_data_frame_has_a_row_for_all_that_was_done(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="needs '.[tables]'")
    frame = TRACE.to_dataframe()
    metrics = TRACE.metrics()
    stages = frame[frame.node != "drafter"]
    assert stages.layers.sum() == metrics.layers_computed
    assert stages.layers_saved.sum() == metrics.layers_saved
    assert stages[stages.fate.isin(["cancelled", "saved"])].run.nunique() == metrics.runs_cancelled
    assert set(frame.node) == {"drafter", "stage 0", "stage 1", "stage 2"}
    assert (frame.ended_s >= frame.began_s).all() and frame.began_s.min() >= 0


def test_what_a_stage_was_spared_is_a_fate_of_its_work_and_shown_by_rings(
    either: Trace,
) -> None:
    history = History(either)
    works = [work for done in history.done for work in work_of(done)]
    saved = [work for work in works if work.fate is Fate.SAVED]
    assert saved
    for work in works:
        run = work.of
        called_off = isinstance(run, Run) and run.cancelled is not None
        assert (work.fate is Fate.SAVED) is (called_off and work.span.layers == 0)
    rings = re.findall("M([0-9.]+) ([0-9]+)m-3 0a3 3", timeline_svg(history))
    assert {int(y) for _, y in rings} == {29 + 22 * work.row for work in saved}
    page = timeline_html(history)
    assert f"ring, nothing computed: {Fate.SAVED.meaning}" in page
    assert f'<th scope="col">{Fate.SAVED.meaning}</th>' in page
    cells = re.findall(r"<td>(\d+)</td><td>\d+</td><td>[^<]*</td></tr>", page)
    assert [int(cell) for cell in cells] == [
        sum(work.row == row for work in saved) for row in range(either.stages + 1)
    ]


def test_data_frames_of_runs_tokens_and_guesses_tell_the_same_story() -> None:
    pytest.importorskip("pandas", reason="needs '.[tables]'")
    metrics = TRACE.metrics()
    runs, tokens, guesses = (TRACE.to_dataframe(rows) for rows in ("runs", "tokens", "guesses"))
    assert len(runs) == metrics.runs
    assert runs.layers_saved.sum() == metrics.layers_saved
    assert runs.cancelled_s.notna().sum() == (runs.reason == "invalid").sum()
    assert set(runs.loc[runs.run > 0, "parents"].str.len()) <= {1, 2, 3, 4}
    assert list(tokens.place) == list(range(metrics.generated_tokens))
    assert tokens.time_s.iloc[0] == metrics.ttft_s
    assert (tokens.origin == "accepted").sum() == metrics.accepted_tokens
    accepted = guesses[guesses.fate == "accepted"].set_index("guess")
    of_drafts = tokens[tokens.confidence.notna()].set_index("guess")
    assert accepted.confidence.loc[of_drafts.index].equals(of_drafts.confidence)
    assert set(guesses.fate) == {"accepted", "rejected", "unused"}
    assert guesses[guesses.fate == "unused"].run.isna().all()
    assert guesses.confidence.between(0, 1).all() and (guesses.ahead >= 1).all()
    assert (guesses.settled_s >= guesses.made_s).all()


@pytest.mark.parametrize("rows", ["work", "runs", "tokens", "guesses"])
def test_a_data_frame_comes_back_from_a_parquet_file_with_its_types(
    rows: Rows, either: Trace, tmp_path: Path
) -> None:
    for lacking in ("pandas", "pyarrow"):
        pytest.importorskip(lacking, reason="needs '.[tables]'")
    import pandas as pd

    frame = either.to_dataframe(rows)
    frame.to_parquet(tmp_path / "trace.parquet")
    back = pd.read_parquet(tmp_path / "trace.parquet")
    assert list(back.dtypes) == list(frame.dtypes)
    if "parents" in frame:
        back.parents = back.parents.map(list)
    assert back.equals(frame)
    # One of a text that was never drafted for has the same types, though nothing is in it.
    plain = simulate("iterative", stages=2, max_new_tokens=3).trace.to_dataframe(rows)
    assert list(plain.columns) == list(frame.columns)
    for name in ("run", "confidence", "done_s", "cancelled_s", "settled_s"):
        assert name not in frame or plain[name].dtype == frame[name].dtype


def test_a_table_that_there_is_not_is_refused() -> None:
    with pytest.raises(
        ValueError, match="expected rows of work, runs, tokens, guesses, got 'bars'"
    ):
        TRACE.to_dataframe("bars")  # type: ignore[arg-type]


def test_without_pandas_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'pipeinfer-dask\[tables\]'"):
        TRACE.to_dataframe()


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]


def images(page: str) -> list[ElementTree.Element]:
    prefix = "data:image/svg+xml;base64,"
    sources = Tags(page).sources
    assert all(source.startswith(prefix) for source in sources)
    return [
        ElementTree.fromstring(base64.b64decode(source.removeprefix(prefix))) for source in sources
    ]


def test_a_picture_shows_each_node_and_each_bar_in_one_path_for_each_fate() -> None:
    picture = ElementTree.fromstring(timeline_svg(History(TRACE)))
    names = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert names[:4] == ["drafter", "stage 0", "stage 1", "stage 2"]
    assert names[-1] is not None and names[-1].endswith(" ms")
    shapes = [path.get("d") or "" for path in picture.iter("{http://www.w3.org/2000/svg}path")]
    bars = sum(len(re.findall("M[^M]*h[^M]*v[^M]*z", shape)) for shape in shapes)
    spans = [
        span
        for _, what in TRACE
        if isinstance(what, (RunDone, Drafted))
        for span in (what.spans if isinstance(what, RunDone) else [what.span])
        if span is not None
        and span.ended > span.began  # in virtual time what is skipped takes none
    ]
    assert bars == len(spans)


def marks_at(picture: ElementTree.Element) -> list[str]:
    return [text for text in texts(picture) if re.fullmatch("[0-9.]+ ms", text)]


def test_a_long_timeline_shows_a_part_with_wide_bars_and_says_which() -> None:
    history = History(simulate("pipeinfer", stages=3, acceptance=0.6, max_new_tokens=300).trace)
    page = timeline_html(history)
    told = "([0-9]+) to ([0-9]+) of ([0-9]+) ms"
    [shown] = [text for text in texts(images(page)[-1]) if text.startswith("Shown: ")]
    [(began, ended, took)] = [tuple(map(int, found)) for found in re.findall(told, shown)]
    assert 0 < began < ended < took == round(history.ended * 1e3)
    assert f"worked on what, {began} to {ended} of {took} ms" in page
    *_, picture = images(page)
    ticks = [float(mark.removesuffix(" ms")) for mark in marks_at(picture)]
    assert min(ticks) >= began and max(ticks) <= ended
    wide = [
        float(width)
        for path in picture.iter("{http://www.w3.org/2000/svg}path")
        for width in re.findall("M[^M]*?h([0-9.]+)v", path.get("d") or "")
    ]
    assert sorted(wide)[len(wide) // 2] > 10


def test_a_short_timeline_is_shown_from_its_prompt_to_its_end() -> None:
    history = History(simulate("iterative", stages=4, max_new_tokens=12).trace)
    page = timeline_html(history)
    assert not [text for text in texts(images(page)[-1]) if text.startswith("Shown")]
    assert marks_at(images(page)[-1])[0] == "0 ms"
    assert f"0 to {history.ended * 1e3:.0f} ms" in page


def test_narrow_bars_have_bands_instead_of_patterns_that_need_room() -> None:
    history = History(simulate("pipeinfer", stages=3, acceptance=0.6, max_new_tokens=300).trace)
    seen = set()
    for part in (None, (0.0, 2.0)):
        picture = ElementTree.fromstring(timeline_svg(history, part))
        kinds = {each.get("id") for each in picture.iter("{http://www.w3.org/2000/svg}pattern")}
        for path in picture.iter("{http://www.w3.org/2000/svg}path"):
            pattern = (path.get("fill") or "").removeprefix("url(#").removesuffix(")")
            for width in re.findall("M[^M]*?h([0-9.]+)v", path.get("d") or ""):
                if pattern in kinds - {"underline"}:
                    seen.add(pattern)
                    assert pattern.startswith("narrow-") is (float(width) <= 3)
    assert {"dots", "crosses", "narrow-crosses"} <= seen


def texts(picture: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]


def test_wide_bars_name_their_run_on_every_stage_and_narrow_ones_do_not() -> None:
    few = History(simulate("iterative", stages=3, max_new_tokens=4).trace)
    numbers = [text for text in texts(ElementTree.fromstring(timeline_svg(few))) if text.isdigit()]
    assert sorted(numbers) == [str(run) for run in few.runs for _ in range(3)]
    many = History(simulate("iterative", stages=3, max_new_tokens=400).trace)
    names = texts(ElementTree.fromstring(timeline_svg(many)))
    assert not [name for name in names if name.isdigit()]


def test_a_mark_says_how_many_tokens_became_text_at_once() -> None:
    history = History(simulate("speculative", stages=2, acceptance=1.0, max_new_tokens=10).trace)
    assert [figures.generated for figures in history.figures] == [1, 6, 10]
    picture = ElementTree.fromstring(timeline_svg(history))
    small = [text for text in picture.iter() if text.get("font-size") == "9"]
    assert [text.text for text in small] == ["5", "4"]


def test_timelines_side_by_side_have_one_scale_and_one_legend() -> None:
    stories = [
        (strategy, History(simulate(strategy, stages=3, max_new_tokens=10).trace))
        for strategy in ("iterative", "pipeinfer")
    ]
    page = comparison_html(stories)
    assert page.count("empty: idle</span>") == 1
    assert re.findall("<b>(.*?)</b>: 10 tokens in", page) == ["iterative", "pipeinfer"]
    slow, fast = images(page)[-2:]
    assert marks_at(slow) == marks_at(fast)
    assert comparison_html([])
    long = [History(simulate(name, stages=3).trace) for name in ("iterative", "pipeinfer")]
    page = comparison_html([("slow", long[0]), ("fast", long[1])])
    slow, fast = images(page)[-2:]
    assert marks_at(slow) == marks_at(fast)
    assert [
        any(f"of {story.ended * 1e3:.0f} ms" in text for text in texts(picture))
        for story, picture in zip(long, (slow, fast), strict=True)
    ] == [True, True]


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ((0.0, 0.055), ["Shown: the first 55 of {all} ms"]),
        ((0.25, 0.5), ["Shown: 250 to 500 of {all} ms"]),
        ((0.25, 9.0), ["Shown: from 250 ms to the end at {all} ms"]),
        ((0.0, 9.0), []),
        (None, []),
    ],
)
def test_a_picture_of_a_part_says_so_in_itself(
    part: tuple[float, float] | None, told: list[str]
) -> None:
    history = History(simulate("iterative", stages=4, max_new_tokens=12).trace)
    said = texts(ElementTree.fromstring(timeline_svg(history, part)))
    whole = f"{history.ended * 1e3:.0f}"
    assert [text for text in said if "Shown" in text] == [text.format(all=whole) for text in told]


def test_pictures_in_a_notebook_are_small_and_name_nothing_outside() -> None:
    long = simulate("adaptive", stages=16, acceptance=0.8, max_new_tokens=500).trace
    page = trace_html(long)
    assert len(page) < 60_000
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)
    assert len(images(page)) == 8


def test_what_a_model_says_can_do_nothing_in_a_page() -> None:
    trace = simulate("pipeinfer", stages=2, acceptance=0.6, max_new_tokens=10).trace
    trace.pieces, trace.texts = [EVIL] * 10, dict.fromkeys(range(-9, 1000), EVIL)
    page = result_html(trace, EVIL)
    assert "script" not in Tags(page).found
    struck = Tags(page).found.count("s") - 1  # one is in its legend
    assert page.count("&lt;script&gt;") == 1 + 2 * 10 + struck and struck > 0
    assert Tags(page).found.count("pre") == 2


def test_a_trace_of_nothing_is_shown_as_such() -> None:
    assert "nothing is done yet" in trace_html(Trace(2))
    assert "nothing is done yet" in result_html(Trace(2), "queued")


HOLLOW = re.compile(r'<path d="([^"]*)" fill="#fff" stroke="#767676" stroke-dasharray')


def test_a_picture_of_a_moment_shows_as_open_what_was_decided_later() -> None:
    history = History(TRACE)
    works = [work for done in history.done for work in work_of(done)]
    cancelled = [work.of for work in works if work.fate is Fate.CANCELLED]
    decided = [run.decided for run in cancelled if isinstance(run, Run) and run.decided is not None]
    for number, moment in enumerate((decided[-1] - 1e-9, decided[-1])):
        begun = [work for work in works if work.span.began < moment and work.span.layers]
        still_open = [work for work in begun if work.open_at(moment)]
        assert bool(still_open) is (number == 0)  # all that were open are called off at once
        picture = timeline_svg(history, None, moment)
        shapes = "".join(HOLLOW.findall(picture))
        assert shapes.count("z") == len(still_open)
        page = timeline_html(history, moment - history.began)
        assert "hollow, dashed: still open" in page and '<th scope="col">still open</th>' in page
        assert f"as it was at {(moment - history.began) * 1e3:.0f} ms" in page
        cells = re.findall(r"<td>(\d+)</td><td>[^<]*</td></tr>", page)
        assert [int(cell) for cell in cells] == [
            sum(work.row == row for work in still_open) for row in range(TRACE.stages + 1)
        ]
    before, after = (timeline_svg(history, None, decided[0] + gap) for gap in (-1e-9, 0))
    assert before.count("#d55e00") < after.count("#d55e00")
    ended = timeline_html(history)
    assert not HOLLOW.search(timeline_svg(history)) and "still open" not in ended


def test_rows_name_their_machines_where_there_are_several() -> None:
    several = {
        "drafter": "node3.cluster.example, worker 0",
        "stage 0": "node7.cluster.example, worker 1",
        "stage 1": "a-machine-with-a-long-name, worker 2",
        "stage 2": "tcp://10.0.0.7:41234",
    }
    told = [
        "drafter · node3",
        "stage 0 · node7",
        "stage 1 · a-machine-with-…",
        "stage 2 · 10.0.0.7",
    ]
    alone = {"drafter": "10.0.0.7, worker 0", "stage 0": "tcp://10.0.0.7:41234"}
    names = ["drafter", "stage 0", "stage 1", "stage 2"]
    for places, expected in ((several, told), (alone, names)):
        trace = replace(TRACE, places=places)
        assert row_names(trace) == expected
        assert texts(ElementTree.fromstring(timeline_svg(History(trace))))[:4] == expected
        lines = str(draw(trace, 60)).splitlines()
        assert [re.split(r" [^·\w]", line)[0].rstrip() for line in lines[:4]] == expected
        assert Channel(trace).about["rows"] == expected
    long = timeline_svg(History(replace(TRACE, places=several)))
    starts = [float(x) for x in re.findall(r'<path d="M(\d+) \d+H', long)]
    assert min(starts) > 6 * max(map(len, told))  # no bar lies on a name
    assert timeline_svg(History(replace(TRACE, places=alone))) == timeline_svg(History(TRACE))
