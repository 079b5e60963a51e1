"""Traces for other programs: Perfetto, pandas, and pages without scripts."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeinfer_dask.protocol.messages import Commit, Drafted, RunDone
from pipeinfer_dask.simulation import simulate
from pipeinfer_dask.trace import History, Trace
from pipeinfer_dask.trace.picture import (
    comparison_html,
    result_html,
    timeline_html,
    timeline_svg,
    trace_html,
)

TRACE = simulate("pipeinfer", stages=3, acceptance=0.6, max_new_tokens=60).trace
EVIL = "</pre><script>alert('1')</script>&"


def events(trace: Trace, path: Path) -> list[dict[str, Any]]:
    trace.to_perfetto(path)
    document = json.loads(path.read_text())
    assert document["displayTimeUnit"] == "ms"
    listed = document["traceEvents"]
    assert isinstance(listed, list)
    return listed


def of(phase: str, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in listed if event["ph"] == phase]


def test_perfetto_events_have_the_fields_that_the_format_asks_of_each_phase(tmp_path: Path) -> None:
    more = {
        "M": {"args"},
        "X": {"ts", "dur", "cat", "args"},
        "s": {"ts", "id", "cat"},
        "f": {"ts", "id", "cat", "bp"},
        "i": {"ts", "s", "args"},
    }
    listed = events(TRACE, tmp_path / "trace.json")
    assert {event["ph"] for event in listed} == more.keys()
    for event in listed:
        assert event.keys() == {"ph", "name", "pid", "tid"} | more[event["ph"]]
        assert isinstance(event["name"], str)
        for number in ("ts", "dur"):
            assert number not in event or event[number] >= 0
    assert {event["s"] for event in of("i", listed)} <= {"g", "p", "t"}


def test_perfetto_shows_a_thread_for_each_node_and_all_that_it_did(tmp_path: Path) -> None:
    listed = events(TRACE, tmp_path / "trace.json")
    names = {e["tid"]: e["args"]["name"] for e in of("M", listed) if e["name"] == "thread_name"}
    assert list(names.values()) == ["head", "drafter", "stage 0", "stage 1", "stage 2"]
    work = [what for _, what in TRACE if isinstance(what, (RunDone, Drafted))]
    spans = sum(len(what.spans) if isinstance(what, RunDone) else 1 for what in work)
    slices = of("X", listed)
    assert len(slices) == spans
    for thread in names:
        row = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == thread)
        # One thing at a time, or the viewer would nest them; times are rounded to a nanosecond.
        assert all(end <= start + 0.0021 for (_, end), (start, _) in pairwise(row))


def test_perfetto_arrows_lead_from_a_slice_of_a_run_to_its_next(tmp_path: Path) -> None:
    listed = events(TRACE, tmp_path / "trace.json")
    slices = {(e["tid"], e["ts"]): e["name"] for e in of("X", listed) if e["dur"] > 0}
    starts = {e["id"]: e for e in of("s", listed)}
    ends = {e["id"]: e for e in of("f", listed)}
    assert starts.keys() == ends.keys()
    assert len(starts) == len(of("s", listed)) > 0
    for number, start in starts.items():
        end = ends[number]
        assert end["bp"] == "e"
        assert slices[start["tid"], start["ts"]] == slices[end["tid"], end["ts"]]
        assert start["tid"] < end["tid"] and start["ts"] <= end["ts"]


def test_perfetto_marks_each_token_and_each_wave_of_cancelling(tmp_path: Path) -> None:
    listed = events(TRACE, tmp_path / "trace.json")
    tokens = sum(len(what.tokens) for _, what in TRACE if isinstance(what, Commit))
    marks = [event["name"] for event in of("i", listed)]
    assert sum(name.startswith("token ") for name in marks) == tokens
    assert marks.count("cancel (invalid)") == len(History(TRACE).waves) > 0


def test_a_data_frame_has_a_row_for_all_that_was_done(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed: pip install -e '.[tables]'")
    frame = TRACE.to_dataframe()
    metrics = TRACE.metrics()
    stages = frame[frame.node != "drafter"]
    assert stages.layers.sum() == metrics.layers_computed
    assert stages.layers_saved.sum() == metrics.layers_saved
    assert stages[stages.fate == "cancelled"].run.nunique() == metrics.runs_cancelled
    assert set(frame.node) == {"drafter", "stage 0", "stage 1", "stage 2"}
    assert (frame.ended_s >= frame.began_s).all() and frame.began_s.min() >= 0
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[tables]'")
    import pandas as pd

    frame.to_parquet(tmp_path / "trace.parquet")
    assert pd.read_parquet(tmp_path / "trace.parquet").equals(frame)


def test_without_pandas_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
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
    *_, picture = images(timeline_html(History(TRACE)))
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
        if span is not None and span.ended > span.began
    ]
    assert bars == len(spans)


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
    assert [name for name in texts(slow) if name.endswith(" ms")] == [
        name for name in texts(fast) if name.endswith(" ms")
    ]
    assert comparison_html([])


def test_pictures_in_a_notebook_are_small_and_name_nothing_outside() -> None:
    long = simulate("adaptive", stages=16, acceptance=0.8, max_new_tokens=500).trace
    page = trace_html(long)
    assert len(page) < 60_000
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)
    assert len(images(page)) == 7


def test_what_a_model_says_can_do_nothing_in_a_page() -> None:
    trace = simulate("pipeinfer", stages=2, acceptance=0.6, max_new_tokens=10).trace
    trace.pieces = [EVIL] * 10
    page = result_html(trace, EVIL)
    assert "script" not in Tags(page).found
    assert page.count("&lt;script&gt;") == 11
    assert Tags(page).found.count("pre") == 1


def test_a_trace_of_nothing_is_shown_as_such() -> None:
    assert "nothing is done yet" in trace_html(Trace(2))
    assert "nothing is done yet" in result_html(Trace(2), "queued")
