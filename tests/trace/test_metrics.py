"""Figures are folds over what the machine was told and said."""

from __future__ import annotations

import pytest

from pipeinfer_dask.protocol.messages import (
    Batch,
    Begin,
    CancelReason,
    CancelRuns,
    Command,
    Commit,
    Drafted,
    Event,
    Finish,
    Kind,
    Origin,
    RunDone,
    Span,
    StartRun,
)
from pipeinfer_dask.trace import Trace


def start(run: int, kind: Kind, positions: tuple[int, ...]) -> StartRun:
    n = len(positions)
    tokens = tuple(position + 3 for position in positions)
    return StartRun(0, 0, run, kind, Batch(tokens, positions, positions, (0,) * n), n)


def example() -> Trace:
    """Two prompt tokens; a single run; a speculative one that is half right; one in vain."""
    trace = Trace(stages=2)
    records: list[tuple[float, Event | Command]] = [
        (10.0, Begin(0)),
        (10.0, start(0, Kind.PREFILL, (0, 1))),
        (11.0, RunDone(0, 0, 0, (5,), (Span(10.0, 10.4, 3), Span(10.5, 10.9, 3)))),
        (11.0, Commit(0, (5,), (Origin.PLAIN,))),
        (11.0, start(1, Kind.SINGLE, (2,))),
        (11.0, Drafted(0, 0, 0, (), (), Span(10.0, 11.0, 2))),
        (11.1, start(2, Kind.SPECULATIVE, (3, 4))),
        (11.2, start(3, Kind.SPECULATIVE, (5,))),
        (12.0, RunDone(0, 0, 1, (6,), (Span(11.0, 11.2, 3), Span(11.2, 11.4, 3)))),
        (12.0, Commit(0, (6,), (Origin.ACCEPTED,))),
        (14.0, RunDone(0, 0, 2, (7, 8), (Span(11.4, 12.0, 3), Span(12.0, 12.6, 3)))),
        (14.0, CancelRuns(0, 0, (3,), CancelReason.INVALID)),
        (14.0, Commit(0, (7,), (Origin.CORRECTED,))),
        (14.5, RunDone(0, 0, 3, None, (Span(13.0, 13.2, 2), Span(13.9, 13.9, 0)))),
        (14.5, Finish(0, "length")),
    ]
    for time, what in records:
        trace.add(time, what)
    return trace


def test_times_are_from_the_start_to_the_first_and_between_the_tokens() -> None:
    metrics = example().metrics()
    assert metrics.ttft_s == pytest.approx(1.0)
    assert metrics.itl_s == pytest.approx(1.5)
    assert metrics.tokens_per_s == pytest.approx(0.75)


def test_drafted_tokens_are_those_that_took_part_in_a_run() -> None:
    metrics = example().metrics()
    assert metrics.generated_tokens == 3
    assert metrics.drafted_tokens == 3
    assert metrics.accepted_tokens == 1
    assert metrics.acceptance_rate == pytest.approx(1 / 3)
    assert metrics.agreement_rate == pytest.approx(1 / 2)


def test_the_root_of_a_standard_speculative_run_is_not_drafted() -> None:
    trace = Trace(stages=1)
    trace.add(0.0, Begin(0))
    trace.add(0.0, start(0, Kind.PREFILL, (0, 1)))
    trace.add(1.0, Commit(0, (5,), (Origin.PLAIN,)))
    trace.add(1.0, start(1, Kind.SPECULATIVE, (2, 3, 4)))
    assert trace.metrics().drafted_tokens == 2


def test_a_drafted_token_that_is_confirmed_before_its_run_starts_counts_as_drafted() -> None:
    trace = Trace(stages=1)
    trace.add(0.0, Begin(0))
    trace.add(0.0, start(0, Kind.PREFILL, (0, 1)))
    trace.add(1.0, Commit(0, (5, 6), (Origin.PLAIN, Origin.ACCEPTED)))
    trace.add(1.0, start(1, Kind.SINGLE, (3,)))
    assert trace.metrics().drafted_tokens == 1
    assert trace.metrics().acceptance_rate == 1.0


def test_cancelled_runs_are_counted_by_reason_and_their_layers_as_wasted() -> None:
    metrics = example().metrics()
    assert metrics.runs == 4
    assert metrics.runs_cancelled == 1
    assert metrics.runs_cancelled_invalid == 1
    assert metrics.runs_cancelled_superfluous == 0
    assert metrics.layers_computed == 20
    assert metrics.layers_wasted == 2


def test_utilization_is_the_share_of_the_time_until_the_last_token() -> None:
    metrics = example().metrics()
    assert metrics.stage_utilization == pytest.approx([1.4 / 4, 1.2 / 4])
    assert metrics.drafter_utilization == pytest.approx(1.0 / 4)


def test_there_are_no_figures_of_what_did_not_happen() -> None:
    metrics = Trace(stages=2).metrics()
    assert metrics.ttft_s is None
    assert metrics.itl_s is None
    assert metrics.tokens_per_s is None
    assert metrics.acceptance_rate is None
    assert metrics.stage_utilization == [0.0, 0.0]
