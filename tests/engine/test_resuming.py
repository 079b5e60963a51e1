"""A text that was interrupted goes on from its tokens, whatever it was asked for with."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import pipeinfer_dask as pi
from pipeinfer_dask.engine import GenerationInterrupted
from tests.engine.pairs import PROMPT, Pair

NEW_TOKENS = 48
SEED = 23

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.8},
    "top_h": {"top_h": 0.4},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.01},
    "all that sample": {"temperature": 1.2, "top_k": 60, "top_p": 0.95, "min_p": 0.01},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "repetition_penalty, sampled": {"repetition_penalty": 1.3, "temperature": 0.9},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[120], [26, 26], [7, 8, 9]]},
    "sequence_bias": {"sequence_bias": [[[120], -9.0], [[26, 26], -4.5]]},
    "suppress_tokens": {"suppress_tokens": list(range(0, 200, 3))},
    "min_length": {"min_length": len(PROMPT) + 30, "eos_token_id": list(range(0, 280, 7))},
    "min_new_tokens": {"min_new_tokens": 30, "eos_token_id": list(range(0, 280, 7))},
    "eos_token_id": {"eos_token_id": list(range(0, 280, 50)), "temperature": 1.0},
    "logprobs": {"logprobs": 3, "temperature": 0.9},
}


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Iterator[pi.Engine]:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True) as engine:
        yield engine


def rest_of(
    engine: pi.Engine, whole: pi.Result, prompt: list[int], count: int, options: dict[str, Any]
) -> pi.Result:
    """Go on after so many tokens, as the page on troubleshooting says."""
    settings = dict(options)
    if "min_new_tokens" in settings:
        settings["min_new_tokens"] = max(0, settings["min_new_tokens"] - count)
    return engine.generate(
        [*prompt, *whole.token_ids[:count]],
        max_new_tokens=NEW_TOKENS - count,
        seed=whole.seed,
        **settings,
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_text_goes_on_with_the_same_tokens_wherever_it_was_interrupted(
    engine: pi.Engine, name: str
) -> None:
    options = SETTINGS[name]
    whole = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, seed=SEED, **options)
    for count in sorted({1, min(17, len(whole.token_ids) - 1), len(whole.token_ids) - 1} - {0}):
        rest = rest_of(engine, whole, PROMPT, count, options)
        assert whole.token_ids[:count] + rest.token_ids == whole.token_ids
        assert rest.finish_reason == whole.finish_reason
        if whole.logprobs is not None and rest.logprobs is not None:
            for one, other in zip(whole.logprobs[count:], rest.logprobs, strict=True):
                assert one.token == pytest.approx(other.token, abs=1e-4)
                assert [token for token, _ in one.best] == [token for token, _ in other.best]


def test_a_text_with_a_stop_string_ends_where_it_would_have_wherever_it_was_interrupted() -> None:
    pair, prompt = pi.demo_pair(), "class Reader:"
    with pi.Engine.from_pretrained(pair.target, pair.draft, in_process=True) as engine:
        text = engine.generate(prompt, max_new_tokens=NEW_TOKENS)
        tokens = list(engine.tokenizer(prompt)["input_ids"])
        for begin in (5, 20, len(text.text) - 12):
            options: dict[str, Any] = {"stop_strings": [text.text[begin : begin + 6]]}
            whole = engine.generate(prompt, max_new_tokens=NEW_TOKENS, **options)
            assert whole.finish_reason == "stop_string"
            # Amid the stop string, too.
            for count in range(max(1, len(whole.token_ids) - 4), len(whole.token_ids)):
                rest = rest_of(engine, whole, tokens, count, options)
                assert whole.token_ids[:count] + rest.token_ids == whole.token_ids
                assert rest.finish_reason == "stop_string"


def test_what_is_known_of_an_interrupted_text_is_all_that_came(pair: Pair) -> None:
    with pi.Engine.from_pretrained(pair.target, stages=2, in_process=True) as engine:
        run = engine.start(PROMPT, max_new_tokens=480, temperature=0.9, seed=SEED, logprobs=2)
        next(iter(run))
    with pytest.raises(GenerationInterrupted) as caught:
        run.result(60)
    lost = caught.value
    assert lost.request.sampling is not None and lost.request.sampling.seed == SEED
    assert lost.partial_logprobs is not None
    assert len(lost.partial_logprobs) == len(lost.partial_ids) > 0
    with pi.Engine.from_pretrained(pair.target, stages=2, in_process=True) as engine:
        whole = engine.generate(PROMPT, max_new_tokens=480, temperature=0.9, seed=SEED, logprobs=2)
    assert whole.token_ids[: len(lost.partial_ids)] == lost.partial_ids
    assert whole.logprobs is not None
    for one, other in zip(whole.logprobs, lost.partial_logprobs, strict=False):
        assert one.token == pytest.approx(other.token, abs=1e-4)


def pickled(lost: GenerationInterrupted) -> Any:
    """Take it to another process and back."""
    return pickle.loads(pickle.dumps(lost))


@pytest.mark.parametrize("move", [pickled, copy.copy, copy.deepcopy])
def test_an_interrupted_text_can_be_sent_and_copied(
    pair: Pair, move: Callable[[GenerationInterrupted], Any]
) -> None:
    with pi.Engine.from_pretrained(pair.target, stages=2, in_process=True) as engine:
        run = engine.start(PROMPT, max_new_tokens=480, logprobs=2)
        next(iter(run))
    with pytest.raises(GenerationInterrupted) as caught:
        run.result(60)
    lost = caught.value
    moved = move(lost)
    assert type(moved) is GenerationInterrupted
    assert str(moved) == str(lost)
    assert moved.partial_ids and vars(moved) == vars(lost)
