"""What a pass, a place in a run and a token are found to cost, where all take turns."""

from __future__ import annotations

import random

import pytest

from pipeinfer_dask.policies.turns import Turns

PLAIN, PLACE, PASS = 0.024, 0.003, 0.002


def after(turns: int, tokens: int, *, noise: float = 0.0, slower: float = 1.0) -> Turns:
    """Return what is known after turns of a draft and a run of 3 to 7, which give so much."""
    found, chance, now = Turns(), random.Random(0), 0.0
    found.ran(1, PLAIN)
    found.committed(1, now, speculating=True)
    for number in range(turns):
        size = 3 + number % 5
        run = (PLAIN + PLACE * (size - 1)) * slower * chance.uniform(1 - noise, 1 + noise)
        found.drafted(size - 1, PASS * slower * (size - 1))
        found.ran(size, run)
        now += run + PASS * slower * (size - 1)
        found.committed(tokens, now, speculating=True)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_what_a_run_costs_is_found_though_hardly_one_is_of_one_token(noise: float) -> None:
    found = after(200, 3, noise=noise)
    assert found.plain == pytest.approx(PLAIN, rel=0.03 + noise)
    assert found.place == pytest.approx(PLACE, rel=0.03 + 2 * noise)


def test_a_token_is_run_if_it_brings_more_than_its_time_brings_otherwise() -> None:
    turn = PLAIN + 4 * (PLACE + PASS)  # the mean one
    found = after(200, 3)
    assert found.least_to_run == pytest.approx(PLACE * 3 / turn, rel=0.1)
    assert found.least_to_extend(0.8) == pytest.approx((PLACE + PASS) * 3 / turn / 0.8, rel=0.1)


def test_more_is_asked_of_a_token_the_faster_the_text_grows_anyway() -> None:
    slow, fast = after(50, 1), after(50, 4)
    assert slow.least_to_run < fast.least_to_run
    assert slow.least_to_extend(0.8) < fast.least_to_extend(0.8)
    assert fast.least_to_extend(0.8) < fast.least_to_extend(0.4)


def test_a_machine_that_is_slower_in_all_changes_nothing() -> None:
    assert after(200, 3, slower=1.9).least_to_run == pytest.approx(after(200, 3).least_to_run, 0.1)


def test_one_run_that_was_held_up_hardly_counts() -> None:
    found = after(50, 3)
    before = found.plain, found.least_to_run
    found.ran(5, 100 * PLAIN)
    found.committed(3, 1e6, speculating=True)
    assert (found.plain, found.least_to_run) == pytest.approx(before, rel=0.25)
    assert found.place > 0


def test_places_are_never_free_and_nothing_is_asked_that_cannot_be() -> None:
    found = Turns()
    found.ran(1, PLAIN)
    for size in [2, 9] * 50:  # the larger, the faster: noise
        found.ran(size, PLAIN / size)
    assert 0 < found.least_to_run < 1
    assert 0 < found.least_to_extend(0.0) < 1
