"""The picture of characters."""

from __future__ import annotations

import pytest

from pipeinfer_dask.simulation import Costs, simulate
from pipeinfer_dask.timeline import Sign, draw, legend, window

PLAIN = simulate(
    "iterative",
    costs=Costs.even(3, stage_s=1.0, hop_cost=0.0),
    prompt_tokens=1,
    max_new_tokens=8,
)


def rows(picture: str) -> dict[str, str]:
    lines = picture.splitlines()
    label = len("drafter") + 1
    return {line[:label].strip(): line[label:] for line in lines}


def test_plain_decoding_keeps_one_stage_busy_at_a_time() -> None:
    picture = rows(draw(PLAIN.trace, 12, (3.0, 9.0)).plain)
    assert picture == {
        "drafter": "............",
        "stage 0": "##....##....",
        "stage 1": "..##....##..",
        "stage 2": "....##....##",
        "tokens": "1     1     ",
    }


def test_the_prompt_is_shown_as_such() -> None:
    assert rows(draw(PLAIN.trace, 6, (0.0, 3.0)).plain)["stage 0"] == "==...."


def test_speculation_is_shown_by_what_it_came_to() -> None:
    trace = simulate("pipeinfer", stages=4, acceptance=0.6).trace
    picture = rows(draw(trace, 100).plain)
    assert {"#", "+", "x"} <= set(picture["stage 0"])
    assert "~" in picture["drafter"]


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
@pytest.mark.parametrize("columns", [1, 20, 133])
def test_every_row_is_as_wide_as_was_asked_for(strategy: str, columns: int) -> None:
    trace = simulate(strategy, stages=2, max_new_tokens=30).trace
    picture = rows(draw(trace, columns).plain)
    assert {len(row) for row in picture.values()} == {columns}


def test_guesses_that_were_all_wrong_are_told_from_those_that_were_not() -> None:
    trace = simulate("speculative", stages=2, acceptance=0.5).trace
    assert {"+", "-"} <= set(rows(draw(trace, 200).plain)["stage 0"])


def test_the_window_begins_with_the_first_token_and_ends_with_the_last() -> None:
    began, ended = window(PLAIN.trace, 1000)
    assert began == pytest.approx(3.0)
    assert ended == pytest.approx(24.0)


def test_an_empty_trace_is_an_empty_picture() -> None:
    picture = rows(draw(type(PLAIN.trace)(2), 10).plain)
    assert set("".join(picture.values())) <= {".", " "}


def test_no_sign_means_two_things_and_each_is_explained() -> None:
    assert len({sign.character for sign in Sign}) == len(Sign)
    for sign in Sign:
        assert f"{sign.character} {sign.meaning}" in legend().plain
