"""Sampled texts: the seed and the settings decide, and nothing else does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import pipeinfer_dask as pi
from pipeinfer_dask.models.sampling import gumbel_noise
from pipeinfer_dask.policies import STRATEGIES
from pipeinfer_dask.protocol.messages import Commit
from pipeinfer_dask.runtime.planning.settings import FIELDS
from tests.engine.pairs import PROMPT, Pair

NEW_TOKENS = 100
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "truncated": {"temperature": 1.2, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
    "looking back": {"temperature": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
}
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


class Noise(LogitsProcessor):
    """Makes the best token a draw."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        noise = gumbel_noise(self.seed, input_ids.shape[1], np.arange(scores.shape[1]))
        return scores.double() + torch.from_numpy(noise)


def reference(path: Path, settings: dict[str, Any], seed: int | None = None) -> Tensor:
    """Return what transformers itself generates: greedily, with noise on its logits for a seed."""
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    last = LogitsProcessorList(
        warper(settings[name]) for name, warper in WARPERS.items() if name in settings
    )
    if seed is not None:
        last.append(Noise(seed))
    ids = torch.tensor([PROMPT])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        logits_processor=last,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        **{name: value for name, value in settings.items() if name not in WARPERS},
    )
    new: Tensor = output[0, len(PROMPT) :]
    return new


@pytest.fixture(scope="module", params=[1, 3], ids=lambda stages: f"{stages} stages")
def engine(request: pytest.FixtureRequest, pair: Pair) -> Iterator[pi.Engine]:
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=request.param, in_process=True
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def one_stage(pair: Pair) -> Iterator[pi.Engine]:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=1, in_process=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def sampled(pair: Pair) -> dict[str, list[int]]:
    return {name: reference(pair.target, how, 7).tolist() for name, how in SETTINGS.items()}


# --- the same whoever picks ---------------------------------------------------------------


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sampled_text_depends_on_seed_and_settings_alone(
    engine: pi.Engine, sampled: dict[str, list[int]], strategy: str, how: str
) -> None:
    asked = SETTINGS[how] | {"strategy": strategy, "max_new_tokens": NEW_TOKENS}
    result = engine.generate(PROMPT, seed=7, **asked)
    assert result.token_ids == sampled[how]
    assert result.seed == 7
    if strategy == "speculative":
        assert result.metrics.accepted_tokens > 0


@pytest.mark.cluster
def test_workers_sample_the_same_text(
    tcp_client: Client, pair: Pair, sampled: dict[str, list[int]]
) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, client=tcp_client, stages=2) as engine:
        for strategy, how in zip(STRATEGIES, [*SETTINGS, "looking back"], strict=True):
            asked = SETTINGS[how] | {"strategy": strategy, "max_new_tokens": NEW_TOKENS}
            result = engine.generate(PROMPT, seed=7, logprobs=2, **asked)
            assert result.token_ids == sampled[how]
            assert result.logprobs is not None
            assert [len(one.best) for one in result.logprobs] == [2] * NEW_TOKENS


def test_without_a_seed_each_text_is_another_and_can_be_repeated(one_stage: pi.Engine) -> None:
    first, second = (one_stage.generate(PROMPT, temperature=1.0) for _ in range(2))
    assert first.token_ids != second.token_ids
    again = one_stage.generate(PROMPT, temperature=1.0, seed=first.seed, strategy="iterative")
    assert again.token_ids == first.token_ids


# --- greedy -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [{}, {"temperature": 0}, {"temperature": 2.0, "do_sample": False}]
)
def test_a_text_is_greedy_unless_sampling_is_asked_for(
    one_stage: pi.Engine, pair: Pair, asked: dict[str, Any]
) -> None:
    result = one_stage.generate(PROMPT, seed=3, **asked)
    assert result.token_ids == pair.greedy[:64]
    assert (result.seed, result.logprobs) == (None, None)


GREEDY: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[120], [26, 26], [7, 8, 9]]},
    "sequence_bias": {"sequence_bias": [[[120], -9.0], [[26, 26], -4.5]]},
    "suppress_tokens": {"suppress_tokens": list(range(0, 200, 3))},
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_texts_are_processed_as_generate_does(
    one_stage: pi.Engine, pair: Pair, name: str
) -> None:
    result = one_stage.generate(PROMPT, max_new_tokens=NEW_TOKENS, **GREEDY[name])
    assert result.token_ids == reference(pair.target, GREEDY[name]).tolist()
    assert result.token_ids != pair.greedy[:NEW_TOKENS]


def test_several_tokens_end_a_text_but_not_before_its_least_length(
    one_stage: pi.Engine, pair: Pair
) -> None:
    ends = sorted({pair.greedy[9], pair.greedy[30]})
    for least in (0, 20):
        settings: dict[str, Any] = {"eos_token_id": ends, "min_new_tokens": least}
        expected = reference(pair.target, settings).tolist()
        result = one_stage.generate(PROMPT, max_new_tokens=NEW_TOKENS, **settings)
        assert result.token_ids == expected
        assert least <= len(expected) < NEW_TOKENS
        assert result.finish_reason == "end_token"


# --- ends ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Iterator[pi.Engine]:
    """The embedded pair: its tokens are pieces of words."""
    with pi.Engine.from_pretrained(*pi.demo_pair(), stages=2, in_process=True) as engine:
        yield engine


def test_a_stop_string_ends_the_text_with_the_token_that_completes_it(trained: pi.Engine) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(trained.target.path)
    tokenizer = trained.tokenizer
    prompt = "class Reader:"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    text = prompt + trained.generate(prompt, max_new_tokens=24).text
    several = 0
    # Wherever a stop string begins and ends: within a token, or in the prompt.
    for begin in range(len(prompt) - 2, len(text) - 5, 14):
        stops = [text[begin : begin + 5], "not to be found"]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            stop_strings=stops,
            tokenizer=tokenizer,
        )
        for strategy in ("iterative", "speculative", "adaptive"):
            result = trained.generate(
                prompt, max_new_tokens=24, strategy=strategy, stop_strings=stops
            )
            assert result.token_ids == expected[0, ids.shape[1] :].tolist()
            assert result.finish_reason == "stop_string"
            commits = [what for _, what in result.trace if isinstance(what, Commit)]
            several += len(commits[-1].tokens) > 1
    assert several > 0, "no stop string was completed amid what was committed at once"


# --- log-probabilities ----------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_k": 20, "seed": 5}])
def test_each_token_comes_with_its_log_probability(
    engine: pi.Engine, pair: Pair, strategy: str, how: dict[str, Any]
) -> None:
    result = engine.generate(PROMPT, strategy=strategy, logprobs=3, **how)
    assert result.logprobs is not None
    model: Any = AutoModelForCausalLM.from_pretrained(pair.target)
    tokens = torch.tensor(result.token_ids)
    with torch.inference_mode():
        whole = model(torch.tensor([[*PROMPT, *result.token_ids[:-1]]])).logits[0]
    expected = whole[len(PROMPT) - 1 :].log_softmax(-1)
    picked = expected.gather(1, tokens[:, None])[:, 0]
    assert [one.token for one in result.logprobs] == pytest.approx(picked.tolist(), abs=1e-3)
    best = expected.topk(3).values.flatten().tolist()
    found = [value for one in result.logprobs for _, value in one.best]
    assert found == pytest.approx(best, abs=1e-3)


# --- how it is asked for ---------------------------------------------------------------------


def test_a_generation_config_is_taken_as_it_is_and_keywords_win(one_stage: pi.Engine) -> None:
    keywords: dict[str, Any] = {"temperature": 0.7, "top_k": 30, "repetition_penalty": 1.1}
    expected = one_stage.generate(PROMPT, max_new_tokens=20, seed=1, **keywords).token_ids
    config = GenerationConfig(do_sample=True, max_new_tokens=20, num_beams=1, **keywords)
    for given in (config, config.to_diff_dict(), {**keywords, "max_new_tokens": 20}):
        result = one_stage.generate(PROMPT, seed=1, generation_config=given)
        assert result.token_ids == expected
    shorter = one_stage.generate(PROMPT, max_new_tokens=5, seed=1, generation_config=config)
    assert shorter.token_ids == expected[:5]


def test_a_checkpoint_says_how_to_process_and_to_sample_but_not_whether(
    one_stage: pi.Engine, pair: Pair, tmp_path: Path
) -> None:
    model = shutil.copytree(pair.target, tmp_path / "model")
    stated: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.3}
    (model / "generation_config.json").write_text(json.dumps(stated))
    with pi.Engine.from_pretrained(model, in_process=True, stages=1) as engine:
        greedy = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        expected = reference(pair.target, {"repetition_penalty": 1.3}).tolist()
        assert (greedy.token_ids, greedy.seed) == (expected, None)
        sampled = engine.generate(PROMPT, max_new_tokens=30, do_sample=True, seed=2)
        asked = one_stage.generate(PROMPT, max_new_tokens=30, seed=2, **stated)
        assert sampled.token_ids == asked.token_ids


def test_a_checkpoint_whose_settings_make_no_sense_is_refused(pair: Pair, tmp_path: Path) -> None:
    model = shutil.copytree(pair.target, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"top_p": "high"}))
    with pytest.raises(ValueError, match=r"generation_config.json can't be used: expected top_p"):
        pi.Engine.from_pretrained(model, in_process=True, stages=1)


@pytest.mark.parametrize(
    "stated",
    [{"temperature": 0.0}, {"do_sample": False, "temperature": 0.0, "top_k": -1}],
)
def test_a_checkpoint_that_says_to_be_greedy_may_say_so_in_any_words(
    one_stage: pi.Engine, pair: Pair, tmp_path: Path, stated: dict[str, Any]
) -> None:
    model = shutil.copytree(pair.target, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(stated))
    with pi.Engine.from_pretrained(model, in_process=True, stages=1) as engine:
        text = engine.generate(PROMPT, max_new_tokens=5).token_ids
    assert text == one_stage.generate(PROMPT, max_new_tokens=5).token_ids


def test_no_knob_of_a_strategy_is_a_setting_of_generations() -> None:
    knobs = {knob.name for policy in STRATEGIES.values() for knob in fields(policy)}  # type: ignore[arg-type]
    assert knobs.isdisjoint(FIELDS | {"seed", "logprobs", "generation_config"})
