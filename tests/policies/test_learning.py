"""What `adaptive` learns: calibration, pace, and whether speculation pays."""

from __future__ import annotations

import random

import pytest

from pipeinfer_dask.drafting.calibration import BINS, Calibration, worth
from pipeinfer_dask.policies.pace import PRIOR_SHARE, Pace
from pipeinfer_dask.policies.trial import (
    LONGEST_PAUSE,
    PROBE,
    SETTLE,
    SHORTEST_PAUSE,
    WINDOW,
    Trial,
)
from pipeinfer_dask.protocol.messages import Span


@pytest.mark.parametrize("confidence", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_a_confidence_is_worth_itself_until_something_is_known(confidence: float) -> None:
    assert worth(confidence, ()) == confidence
    assert worth(confidence, Calibration().table) == confidence


def test_a_table_is_read_between_its_entries() -> None:
    assert worth(0.25, (0.0, 0.4, 1.0)) == pytest.approx(0.2)
    assert worth(0.5, (0.0, 0.4, 1.0)) == pytest.approx(0.4)
    assert worth(1.0, (0.0, 0.4, 1.0)) == pytest.approx(1.0)
    assert worth(2.0, (0.0, 0.4, 1.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("true", [0.2, 0.6, 0.95])
def test_a_boastful_model_is_taken_at_what_it_is_worth(true: float) -> None:
    calibration, chance = Calibration(), random.Random(0)
    for _ in range(3000):
        calibration.learn(0.8, chance.random() < true)
    assert worth(0.8, calibration.table) == pytest.approx(true, abs=0.05)


def test_an_honest_model_stays_at_its_word() -> None:
    calibration, chance = Calibration(), random.Random(0)
    for _ in range(20_000):
        confidence = chance.random()
        calibration.learn(confidence, chance.random() < confidence)
    for step in range(BINS + 1):
        assert worth(step / BINS, calibration.table) == pytest.approx(step / BINS, abs=0.04)


def test_one_surprise_hardly_changes_a_calibration() -> None:
    calibration = Calibration()
    calibration.learn(0.95, came=False)
    assert worth(0.95, calibration.table) > 0.8


def spans(seconds: float, stages: int = 3) -> tuple[Span, ...]:
    return tuple(Span(index, index + seconds, 4) for index in range(stages))


def test_the_pace_tells_what_a_further_token_costs() -> None:
    pace = Pace()
    for tokens in [1, 4, 2, 6, 1, 8] * 20:
        pace.ran(tokens, 1.0, spans(0.1 * (1 + 0.25 * (tokens - 1))))
    assert pace.share == pytest.approx(0.25, abs=0.02)
    assert pace.stage_s(5) == pytest.approx(0.2, rel=0.05)
    assert pace.stages == 3
    assert pace.plain == pytest.approx(1.0)


def test_what_plain_decoding_takes_is_what_the_fastest_run_of_one_token_took() -> None:
    pace = Pace()
    for seconds in (3.0, 1.0, 2.0):
        pace.ran(1, seconds, spans(0.1))
    pace.ran(4, 0.5, spans(0.1))
    assert pace.plain == pytest.approx(1.0, rel=0.01)


def test_what_is_known_of_further_tokens_is_not_forgotten_while_runs_have_one_token() -> None:
    pace = Pace()
    for tokens in [1, 2] * 60:
        pace.ran(tokens, 1.0, spans(0.1 * (1 + 0.3 * (tokens - 1))))
    before = pace.share
    for _ in range(1000):
        pace.ran(1, 1.0, spans(0.1))
    assert pace.share == before == pytest.approx(0.3, abs=0.02)


def test_a_pace_that_knows_nothing_has_its_prior() -> None:
    pace = Pace()
    assert (pace.first, pace.plain, pace.trip, pace.share) == (0, 0, 0, PRIOR_SHARE)
    pace.ran(4, 1.0, ())
    assert pace.first == 0


@pytest.mark.parametrize("tokens", [1, 4])
def test_one_run_that_is_held_up_hardly_changes_the_pace(tokens: int) -> None:
    pace = Pace()
    for size in [1, 4] * 30:
        pace.ran(size, 1.0, spans(0.1 * (1 + 0.3 * (size - 1))))
    before = pace.stage_s(4)
    pace.ran(tokens, 100.0, spans(50.0))
    assert pace.stage_s(4) == pytest.approx(before, rel=0.16)


def test_a_pipeline_that_gets_slower_is_found_out() -> None:
    pace = Pace()
    for seconds in [0.1] * 10 + [1.0] * 60:
        pace.ran(1, 1.0, spans(seconds))
    assert pace.first == pytest.approx(1.0, rel=0.05)


def test_a_first_run_that_was_slow_is_corrected_by_runs_of_any_size() -> None:
    pace = Pace()
    pace.ran(1, 1.0, spans(10.0))
    for _ in range(60):
        pace.ran(4, 1.0, spans(0.1))
    assert pace.first == pytest.approx(0.1, rel=0.05)


def test_the_way_to_the_first_stage_is_the_least_of_late() -> None:
    pace = Pace()
    for seconds in (0.4, 0.1, 0.5, 0.3):
        pace.taken_at_once(seconds)
    assert pace.trip == pytest.approx(0.1, rel=0.01)


class Text:
    """A text whose tokens take a given time each."""

    def __init__(self) -> None:
        self.trial = Trial()
        self.now = 0.0
        self.modes: list[bool] = []

    def go(self, tokens: int, *, speculating_s: float, plain_s: float, known_s: float) -> None:
        for _ in range(tokens):
            self.now += speculating_s if self.trial.speculate else plain_s
            self.trial.committed(1, self.now, known_s)
            self.modes.append(self.trial.speculate)


def test_speculation_that_is_clearly_fast_is_never_interrupted() -> None:
    text = Text()
    text.go(2000, speculating_s=0.3, plain_s=1.0, known_s=1.0)
    assert all(text.modes)


def test_speculation_that_loses_pauses_for_longer_each_time() -> None:
    text = Text()
    text.go(8000, speculating_s=1.5, plain_s=1.0, known_s=1.4)
    speculating = sum(text.modes)
    assert speculating < 0.06 * 8000
    assert not any(text.modes[-LONGEST_PAUSE // 2 : -SHORTEST_PAUSE]) or speculating < 200


def test_speculation_that_is_no_worse_is_kept_after_a_few_plain_tokens() -> None:
    text = Text()
    text.go(1000, speculating_s=0.95, plain_s=1.0, known_s=1.0)
    plain = len(text.modes) - sum(text.modes)
    assert 0 < plain <= 1000 / (WINDOW + SHORTEST_PAUSE) * 2 * (PROBE + SETTLE)


def test_nothing_is_tried_before_the_time_of_a_run_is_known() -> None:
    text = Text()
    text.go(200, speculating_s=5.0, plain_s=1.0, known_s=0.0)
    assert all(text.modes)


def test_a_draft_model_that_gets_better_is_found_out() -> None:
    text = Text()
    text.go(300, speculating_s=1.5, plain_s=1.0, known_s=1.4)
    assert not text.modes[-1]
    text.go(1500, speculating_s=0.2, plain_s=1.0, known_s=1.4)
    assert all(text.modes[-100:])
