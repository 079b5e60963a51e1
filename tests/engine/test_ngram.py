"""Drafting without a draft model: ``draft="ngram"``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import enumerate as threads
from typing import Any

import pytest
from distributed import Client

import pipeinfer_dask as pi
from tests.clusters import client_of
from tests.engine.pairs import LAYERS, PROMPT, Pair
from tests.engine.test_exact import STRATEGIES

NEW_TOKENS = 100


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Iterator[pi.Engine]:
    with pi.Engine.from_pretrained(pair.target, "ngram", stages=2, in_process=True) as engine:
        yield engine


@pytest.mark.parametrize("asked", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_the_text_is_what_plain_decoding_gives(
    engine: pi.Engine, pair: Pair, asked: dict[str, Any]
) -> None:
    result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, **asked)
    assert result.token_ids == pair.greedy[:NEW_TOKENS]


def test_what_the_text_repeats_is_drafted_and_accepted(engine: pi.Engine, pair: Pair) -> None:
    prompt = [*PROMPT, *pair.greedy[:60], *PROMPT]
    plain = engine.generate(prompt, max_new_tokens=40, strategy="iterative")
    looked_up = engine.generate(prompt, max_new_tokens=40, strategy="speculative")
    assert looked_up.token_ids == plain.token_ids
    assert looked_up.metrics.accepted_tokens > 0


def test_adaptive_is_the_default(engine: pi.Engine) -> None:
    assert engine.generate(PROMPT, max_new_tokens=4).strategy == "adaptive"


def test_an_engine_says_what_it_drafts_with(engine: pi.Engine) -> None:
    assert engine.draft == "ngram"
    assert repr(engine) == "<Engine target, draft ngram, 2 stages>"


def test_a_measured_lookup_can_be_simulated(engine: pi.Engine, pair: Pair) -> None:
    costs = engine.measure_costs()
    assert 0 < max(costs.draft.seconds) < min(costs.stages[0].seconds)
    assert engine.generate(PROMPT, max_new_tokens=30).token_ids == pair.greedy[:30]


@pytest.mark.cluster
def test_a_lookup_takes_no_worker_and_ends_with_the_engine(
    pair: Pair, inproc_client: Client
) -> None:
    before = set(threads())
    with pi.Engine.from_pretrained(pair.target, "ngram", client=inproc_client) as engine:
        assert engine.stages == LAYERS  # a fifth worker would be there for a draft model
        (drafter,) = (t for t in {*threads()} - before if t.name.endswith("drafter"))
        for asked in STRATEGIES.values():
            result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, **asked)
            assert result.token_ids == pair.greedy[:NEW_TOKENS]
    assert not drafter.is_alive()


@pytest.mark.cluster
def test_an_engine_that_looks_up_has_as_many_stages_as_there_are_workers(pair: Pair) -> None:
    with (
        client_of(2) as client,
        pi.Engine.from_pretrained(pair.target, "ngram", client=client) as engine,
    ):
        assert engine.stages == 2


def test_a_directory_of_that_name_can_still_be_a_draft(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ngram").symlink_to(pair.draft)
    monkeypatch.chdir(tmp_path)
    with pi.Engine.from_pretrained(pair.target, "./ngram", stages=1, in_process=True) as engine:
        assert engine.draft not in (None, "ngram")
