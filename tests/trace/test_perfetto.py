"""Traces as Perfetto opens them: the format's rules, and what is told by them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeinfer_dask.protocol.messages import Commit, Drafted, RunDone
from pipeinfer_dask.simulation import simulate
from pipeinfer_dask.trace import Fate, History, Trace
from pipeinfer_dask.trace.picture import timeline_html
from pipeinfer_dask.trace.tables import work_of
from tests.trace.event_format import FIELDS, violations

TRACE = simulate("pipeinfer", stages=3, acceptance=0.6, max_new_tokens=60).trace


def events(trace: Trace, path: Path) -> list[dict[str, Any]]:
    trace.to_perfetto(path)
    document = json.loads(path.read_text())
    assert document["displayTimeUnit"] == "ms"
    listed = document["traceEvents"]
    assert isinstance(listed, list)
    return listed


def run_in(name: str) -> int:
    return int(name.removeprefix("run ").split(":")[0])


def of(phase: str, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in listed if event["ph"] == phase]


def test_what_is_written_keeps_to_the_format(either: Trace, tmp_path: Path) -> None:
    listed = events(either, tmp_path / "trace.json")
    assert violations((tmp_path / "trace.json").read_text()) == []
    assert {event["ph"] for event in listed} == FIELDS.keys()


@pytest.mark.parametrize(
    "losses", [[(0.4, 1)], [(0.5, None), (0.9, 0)]], ids=["stage", "drafter and stage"]
)
def test_a_trace_with_losses_keeps_to_the_format(
    losses: list[tuple[float, int | None]], tmp_path: Path
) -> None:
    lossy = simulate("adaptive", stages=3, losses=losses, max_new_tokens=30).trace
    marks = [event["name"] for event in of("i", events(lossy, tmp_path / "trace.json"))]
    assert violations((tmp_path / "trace.json").read_text()) == []
    assert len([mark for mark in marks if mark.startswith("lost: ")]) == len(losses)


def test_a_trace_of_nothing_keeps_to_the_format(tmp_path: Path) -> None:
    assert {event["ph"] for event in events(Trace(2), tmp_path / "trace.json")} == {"M"}
    assert violations((tmp_path / "trace.json").read_text()) == []


@pytest.mark.parametrize(
    ("phase", "change", "told"),
    [
        ("X", lambda e: e.update(ts=float("nan")), "NaN is not JSON"),
        ("X", lambda e: e.update(dur=-1.0), "dur is -1.0"),
        ("X", lambda e: e.update(ts=True), "ts is True"),
        ("X", lambda e: e.pop("dur"), "its fields are"),
        ("X", lambda e: e.update(tid="stage 0"), "whole ones"),
        ("X", lambda e: e.update(tid=77), "thread (1, 77) has no name"),
        ("X", lambda e: e.update(dur=1e12), "overlap"),
        ("s", lambda e: e.update(id=10**6), "has one end"),
        ("s", lambda e: e.update(ts=0.123), "is at no slice"),
        ("f", lambda e: e.update(bp="i"), "comes next"),
        ("f", lambda e: e.update(id=2), "is there twice"),
        ("i", lambda e: e.update(s="x"), "a mark of 'x'"),
        ("C", lambda e: e.update(args={"runs": "3"}), "counts are numbers"),
        ("M", lambda e: e.update(args={"label": "text"}), "metadata process_name"),
        ("M", lambda e: e.update(name="thread_name"), "process 1 has no name"),
        ("X", lambda e: e.update(ph="B"), "there is no phase 'B'"),
    ],
)
def test_what_breaks_the_format_is_noticed(
    phase: str, change: Callable[[dict[str, Any]], object], told: str, tmp_path: Path
) -> None:
    listed = events(TRACE, tmp_path / "trace.json")
    change(of(phase, listed)[0])
    text = json.dumps({"traceEvents": listed, "displayTimeUnit": "ms"})
    try:
        wrong = violations(text)
    except ValueError as error:
        wrong = [str(error)]
    assert any(told in each for each in wrong), wrong


def test_perfetto_shows_a_thread_for_each_node_and_all_that_it_did(tmp_path: Path) -> None:
    listed = events(TRACE, tmp_path / "trace.json")
    names = {e["tid"]: e["args"]["name"] for e in of("M", listed) if e["name"] == "thread_name"}
    assert list(names.values()) == ["text", "drafter", "stage 0", "stage 1", "stage 2"]
    work = [what for _, what in TRACE if isinstance(what, (RunDone, Drafted))]
    spans = sum(len(what.spans) if isinstance(what, RunDone) else 1 for what in work)
    assert len([e for e in of("X", listed) if e["cat"] == "work"]) == spans
    for thread in names:
        row = sorted((e["ts"], e["ts"] + e["dur"]) for e in of("X", listed) if e["tid"] == thread)
        # One thing at a time, or the viewer would nest them; times are rounded to a nanosecond.
        assert all(end <= start + 0.0021 for (_, end), (start, _) in pairwise(row))


def test_perfetto_keeps_the_slices_of_a_node_apart_where_its_clock_was_corrected(
    tmp_path: Path,
) -> None:
    torn = Trace(TRACE.stages)
    for time, what in TRACE:
        if isinstance(what, RunDone) and what.run % 2:
            early = [replace(span, began=span.began - 0.01) for span in what.spans]
            what = replace(what, spans=tuple(early))
        torn.add(time, what)
    slices = of("X", events(torn, tmp_path / "trace.json"))
    for thread in range(2, 5):
        row = [(e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == thread]
        assert all(end <= start + 0.0021 for (_, end), (start, _) in pairwise(sorted(row)))


def test_a_slice_says_what_its_run_held_and_what_came_of_it(tmp_path: Path) -> None:
    history = History(TRACE)
    seen = set()
    for event in of("X", events(TRACE, tmp_path / "trace.json")):
        name, args = event["name"], event["args"]
        if event["cat"] == "text":
            continue
        if name.startswith("draft "):
            draft = history.drafts[int(name.removeprefix("draft "))]
            told = [(guess["confidence"], guess["fate"]) for guess in args["guesses"].values()]
            assert told == [(guess.confidence, guess.fate) for guess in draft.guesses]
            continue
        run = history.runs[run_in(name)]
        layers = run.spans[event["tid"] - 2].layers
        fate = "saved" if run.cancelled is not None and layers == 0 else run.fate
        seen.add(fate)
        assert name == f"run {run.id}: {fate}"
        assert args["fate"] == fate and args["guesses kept"] == run.kept
        assert args["layers"] == layers
        assert args["tokens"].count("#") == len(run.tokens)
        assert args["parents"] == run.parents
        assert ("layers saved" in args) is (run.cancelled is not None)
    assert seen == {"prefill", "single", "accepted", "cancelled", "saved"}


def test_perfetto_arrows_lead_from_a_draft_through_the_stages_to_the_text(tmp_path: Path) -> None:
    history = History(TRACE)
    listed = events(TRACE, tmp_path / "trace.json")
    slices = {(e["tid"], e["ts"]): e for e in of("X", listed) if e["dur"] > 0}
    starts = {(e["cat"], e["id"]): e for e in of("s", listed)}
    ends = {(e["cat"], e["id"]): e for e in of("f", listed)}
    assert starts.keys() == ends.keys()
    assert len(starts) == len(of("s", listed))
    counts = Counter(kind for kind, _ in starts)
    for place, start in starts.items():
        end = ends[place]
        assert end["bp"] == "e"
        before, after = slices[start["tid"], start["ts"]], slices[end["tid"], end["ts"]]
        assert start["name"] == end["name"] == place[0]
        assert start["ts"] <= end["ts"]
        match place[0]:
            case "run":
                assert before["name"] == after["name"] and start["tid"] < end["tid"]
            case "guesses":
                run = history.runs[run_in(after["name"])]
                draft = int(before["name"].removeprefix("draft "))
                assert draft in {guess.draft for guess in run.guesses}
            case "tokens":
                decided = [token["run"] for token in after["args"]["tokens"]]
                assert run_in(before["name"]) in decided
                assert before["tid"] == 4  # the last stage
    assert set(counts) == {"guesses", "run", "tokens"}
    # All text was decided on by a run, and each that came to it shows by which.
    assert counts["tokens"] >= len(history.figures)


def test_perfetto_shows_the_text_as_it_came_and_each_wave_of_cancelling(tmp_path: Path) -> None:
    listed = events(TRACE, tmp_path / "trace.json")
    commits = [(time, what) for time, what in TRACE if isinstance(what, Commit)]
    texts = [event for event in of("X", listed) if event["cat"] == "text"]
    assert [event["ts"] for event in texts] == [round(1e6 * time, 3) for time, _ in commits]
    told = [token["text"] for event in texts for token in event["args"]["tokens"]]
    assert told == [f"#{token}" for _, what in commits for token in what.tokens]
    marks = [event["name"] for event in of("i", listed)]
    assert marks.count("cancel (invalid)") == len(History(TRACE).waves) > 0


def test_perfetto_counts_what_is_in_flight_and_ends_with_nothing(tmp_path: Path) -> None:
    counters: dict[str, list[dict[str, int]]] = {}
    for event in of("C", events(TRACE, tmp_path / "trace.json")):
        counters.setdefault(event["name"], []).append(event["args"])
    metrics = TRACE.metrics()
    assert counters["runs in flight"][-1] == {"runs": 0}
    assert counters["guesses in flight"][-1] == {"guesses": 0}
    assert max(count["runs"] for count in counters["runs in flight"]) > 3
    assert min(count["guesses"] for count in counters["guesses in flight"]) == 0
    last = counters["tokens"][-1]
    assert last == {"generated": metrics.generated_tokens, "accepted": metrics.accepted_tokens}


def test_work_that_a_stage_was_spared_is_a_slice_of_that_fate(
    either: Trace, tmp_path: Path
) -> None:
    history = History(either)
    saved = [w for done in history.done for w in work_of(done) if w.fate is Fate.SAVED]
    slices = of("X", events(either, tmp_path / "trace.json"))
    named = [each["args"] for each in slices if each["name"].endswith(": saved")]
    assert [(args["fate"], args["layers"]) for args in named] == [("saved", 0) for _ in saved]
    assert saved


def test_nodes_go_by_their_machines_and_workers_where_these_are_known(tmp_path: Path) -> None:
    placed = replace(TRACE, places={"drafter": "far, worker 7", "stage 1": "near, worker 2"})
    listed = events(placed, tmp_path / "trace.json")
    assert violations((tmp_path / "trace.json").read_text()) == []
    names = [e["args"]["name"] for e in of("M", listed) if e["name"] == "thread_name"]
    assert names == [
        "text",
        "drafter on far, worker 7",
        "stage 0",
        "stage 1 on near, worker 2",
        "stage 2",
    ]
    page = timeline_html(History(placed))
    assert page.count("<td>near, worker 2</td>") == page.count("<td>far, worker 7</td>") == 1
    assert '<th scope="col">worker</th>' in page
    assert '<th scope="col">worker</th>' not in timeline_html(History(TRACE))
