"""Prompt lookup: what followed the same tokens before."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer_dask.drafting.ngram import DOUBT, LONGEST, RECENT, NgramDraft
from pipeinfer_dask.policies import STRATEGIES, Policy, make_policy
from pipeinfer_dask.protocol.messages import NO_PARENT, Batch, Origin, StartDraft
from tests.core.world import Path, World

Candidates = list[tuple[int, float]]


def never() -> bool:
    return False


def chain(tokens: Sequence[int], start: int = 0) -> Batch:
    places = tuple(range(start, start + len(tokens)))
    parents = tuple(place - 1 if place else NO_PARENT for place in places)
    return Batch(tuple(tokens), places, places, parents)


def asked(draft: NgramDraft, batch: Batch, frontier: int = 1, width: int = 4) -> list[Candidates]:
    found = draft.candidates(batch, frontier, width=width, stopped=never)
    assert found is not None
    return found


def test_texts_in_caches_of_their_own_do_not_know_of_one_another() -> None:
    draft = NgramDraft()
    for place, pair in enumerate(zip((1, 2, 1), (1, 3, 1), strict=True)):
        for cache, token in enumerate(pair):
            batch = chain([token], place)
            found = draft.candidates(batch, 1, width=4, stopped=never, cache=cache)
            assert found is not None
            if place == 2:
                assert [guess for guess, _ in found[0]] == [(2, 3)[cache]]


def looked_up(*tokens: int, width: int = 4) -> Candidates:
    return asked(NgramDraft(), chain(tokens), width=width)[0]


def naively(tokens: Sequence[int]) -> dict[int, float]:
    """Say how likely each token is next, by a look at every place of the text."""
    chances: dict[int, float] = {}
    for n in range(1, LONGEST + 1):
        ends = [
            end
            for end in range(n, len(tokens))
            if len(tokens) >= n and list(tokens[end - n : end]) == list(tokens[len(tokens) - n :])
        ][-RECENT:]
        if not ends:
            break
        followed = [tokens[end] for end in ends]
        chances = {
            token: (followed.count(token) + DOUBT * chances.get(token, 0)) / (len(ends) + DOUBT)
            for token in {*followed, *chances}
        }
    return chances


def test_what_followed_the_same_tokens_is_proposed() -> None:
    assert [token for token, _ in looked_up(1, 2, 3, 9, 1, 2)] == [3]


def test_where_nothing_was_seen_before_nothing_is_proposed() -> None:
    assert looked_up(1, 2, 3) == []
    assert looked_up(1) == []


def test_a_longer_match_wins_over_a_shorter_and_later_one() -> None:
    assert [token for token, _ in looked_up(1, 2, 7, 5, 2, 8, 1, 2)] == [7, 8]


def test_a_longer_match_gives_more_confidence() -> None:
    ((_, short),) = looked_up(1, 9, 8, 1)
    ((_, long),) = looked_up(1, 2, 3, 9, 8, 1, 2, 3)
    assert 0 < short < long < 1


def test_what_always_followed_gives_more_confidence() -> None:
    ((_, once),) = looked_up(1, 2, 1)
    ((_, often),) = looked_up(1, 2, 1, 2, 1)
    assert once < often < 1


def test_different_continuations_are_siblings_and_the_more_frequent_comes_first() -> None:
    found = looked_up(1, 2, 1, 2, 1, 3, 9, 1)
    assert [token for token, _ in found] == [2, 3]
    assert looked_up(1, 2, 1, 2, 1, 3, 9, 1, width=1) == found[:1]


def test_of_two_equally_frequent_continuations_the_later_comes_first() -> None:
    assert [token for token, _ in looked_up(1, 2, 1, 3, 1)] == [3, 2]


def test_each_branch_is_looked_up_by_its_own_tokens() -> None:
    draft = NgramDraft()
    asked(draft, chain([1, 2, 1, 3, 1]))
    branches = Batch((2, 3), (5, 5), (5, 6), (4, 4))
    after_2, after_3 = asked(draft, branches, 2)
    assert [token for token, _ in after_2] == [1]
    assert [token for token, _ in after_3] == [1]
    assert dict(after_2) == pytest.approx(naively([1, 2, 1, 3, 1, 2]))


def test_a_new_text_knows_nothing_of_the_one_before() -> None:
    draft = NgramDraft()
    asked(draft, chain([1, 2, 3, 1]))
    assert asked(draft, chain([1])) == [[]]


def test_a_draft_that_nobody_waits_for_is_not_made() -> None:
    stopped = NgramDraft().candidates(chain([1, 2, 1]), 1, width=4, stopped=lambda: True)
    assert stopped is None


@given(st.data())
def test_it_finds_what_a_search_of_the_whole_path_finds(data: st.DataObject) -> None:
    """Grow a tree whose slots are used again, as the head does, and ask everywhere."""
    tokens = st.integers(0, 2)
    text = data.draw(st.lists(tokens, min_size=1, max_size=40))
    paths = dict(enumerate(text[: end + 1] for end in range(len(text))))
    draft = NgramDraft()
    batch = chain(text)
    for _ in range(data.draw(st.integers(0, 12))):
        check(asked(draft, batch, 1), paths[batch.slots[-1]])
        # What hangs below a slot that is given to another token is out of use, too.
        parent = data.draw(st.sampled_from(sorted(paths)))
        slot = data.draw(st.sampled_from([*{*range(len(text), len(text) + 6)} - {parent}]))
        path = [*paths[parent], data.draw(tokens)]
        batch = Batch((path[-1],), (len(path) - 1,), (slot,), (parent,))
        paths[slot] = path
    check(asked(draft, batch, 1), paths[batch.slots[-1]])


def check(found: list[Candidates], path: list[int]) -> None:
    expected = naively(path)
    assert dict(found[0]) == pytest.approx(expected)
    assert [chance for _, chance in found[0]] == sorted((c for _, c in found[0]), reverse=True)


class LookupWorld(World):
    """A world whose drafter looks up."""

    def __init__(self, policy: Policy) -> None:
        self.lookup = NgramDraft()
        super().__init__(policy, max_new_tokens=60, spare=60)

    def guesses(self, batch: Batch, ends: list[Path], width: int) -> list[Candidates]:
        return asked(self.lookup, batch, len(ends), width)


class SilentWorld(World):
    """A world whose drafter never has anything to say."""

    def guesses(self, batch: Batch, ends: list[Path], width: int) -> list[Candidates]:
        return [[] for _ in ends]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_with_every_strategy_the_text_is_the_targets_own(strategy: str) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        world = LookupWorld(make_policy(strategy))
        world.run(chance.randrange)
        world.check_end()
        if strategy == "speculative":  # the only one that waits for its draft
            assert world.origins.count(Origin.ACCEPTED) > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_drafter_with_nothing_to_say_is_not_asked_without_end(strategy: str) -> None:
    """Head and drafter would keep each other busy until the target's next token."""
    world = SilentWorld(make_policy(strategy), max_new_tokens=20, spare=40)
    world.run(lambda moves: moves - 1)  # the drafter is always the first to move
    world.check_end()
    assert sum(isinstance(command, StartDraft) for command in world.commands) <= 4 * 20
