"""The synthetic target and draft: what the comparison of strategies rests on."""

from __future__ import annotations

from typing import Any

import pytest

from pipeinfer_dask.protocol.messages import NO_PARENT, Batch
from pipeinfer_dask.simulation.truth import ELSEWHERE, START, Places, SyntheticPair

LENGTH = 5000


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.52, 0.66, 0.79, 0.95, 1.0])
def test_the_first_choice_is_right_as_often_as_was_asked_for(acceptance: float) -> None:
    text = SyntheticPair(acceptance, 3).text(LENGTH)
    assert text.count(0) / LENGTH == pytest.approx(acceptance, abs=0.02)


def test_the_next_choices_are_right_half_as_often_each() -> None:
    text = SyntheticPair(0.4, 1).text(4 * LENGTH)
    counts = [text.count(rank) for rank in range(5)]
    for more, less in ((1, 2), (2, 3), (3, 4)):
        assert counts[less] / counts[more] == pytest.approx(0.5, abs=0.06)


def test_confidences_are_chances() -> None:
    pair = SyntheticPair(0.66, 0)
    text = pair.text(4 * LENGTH)
    for low in (0.1, 0.5, 0.8):
        told = [
            (pair.candidates(place - 1, 1)[0][1], token == 0) for place, token in enumerate(text)
        ]
        right = [came for confidence, came in told if low <= confidence < low + 0.1]
        assert sum(right) / len(right) == pytest.approx(low + 0.05, abs=0.05)


def test_an_overconfident_draft_says_more_than_it_knows() -> None:
    honest, boastful = SyntheticPair(0.66, 0), SyntheticPair(0.66, 0, overconfidence=1.0)
    assert honest.text(100) == boastful.text(100)
    for place in range(50):
        (_, knows), (_, says) = honest.candidates(place, 1)[0], boastful.candidates(place, 1)[0]
        assert says == pytest.approx(knows**0.5)


def test_candidates_sum_to_at_most_one_and_come_best_first() -> None:
    pair = SyntheticPair(0.9, 0)
    for place in range(-2, 50):
        confidences = [confidence for _, confidence in pair.candidates(place, 8)]
        assert sum(confidences) <= 1 + 1e-9
        assert confidences[1:] == sorted(confidences[1:], reverse=True)


def test_the_same_seed_gives_the_same_text_in_whatever_order_it_is_asked() -> None:
    one, other = SyntheticPair(0.7, 5), SyntheticPair(0.7, 5)
    place = START
    for token in one.text(60):
        place = one.follow(place, token)
    assert other.target(place) == one.text(61)[60]
    assert other.text(60) == one.text(60)
    assert SyntheticPair(0.7, 6).text(60) != one.text(60)


def test_off_the_text_nothing_is_ever_right() -> None:
    pair = SyntheticPair(1.0, 0)
    place = pair.follow(START, 1)  # the text is all zeros
    for token in (0, 0, 2):
        assert pair.target(place) == ELSEWHERE
        assert ELSEWHERE not in [candidate for candidate, _ in pair.candidates(place, 8)]
        place = pair.follow(place, token)


def test_a_clairvoyant_draft_proposes_the_right_token_alone() -> None:
    pair = SyntheticPair(0.3, 0, clairvoyant=True)
    for place, token in enumerate(pair.text(50)):
        candidates = pair.candidates(place - 1, 4)
        assert candidates == ([(token, 1.0)] if token < 4 else [(0, 0.0)])


def test_places_follow_slots_and_a_reused_slot_is_what_came_last() -> None:
    pair = SyntheticPair(1.0, 0)
    places = Places(pair)
    assert places.take(Batch((0, 0), (0, 1), (0, 1), (NO_PARENT, 0))) == [0, 1]
    (off,) = places.take(Batch((3,), (2,), (2,), (1,)))
    assert off < START
    assert places.take(Batch((0,), (2,), (2,), (1,))) == [2]
    # a parent that nobody has seen leads nowhere, and must only not fail
    (lost,) = places.take(Batch((0,), (9,), (5,), (77,)))
    assert lost < START


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"acceptance": 1.1}, "expected an acceptance from 0 to 1, got 1.1"),
        ({"acceptance": float("nan")}, "expected an acceptance"),
        ({"acceptance": True}, "expected an acceptance"),
        ({"acceptance": 0.5, "overconfidence": -1}, "expected an overconfidence of at least 0"),
    ],
)
def test_chances_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticPair(**arguments)
