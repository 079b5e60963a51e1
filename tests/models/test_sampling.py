"""Picks are draws from what transformers would sample from, and the same wherever they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeinfer_dask.models.sampling import Sampler, gumbel_noise, logprobs
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.protocol.messages import NO_PARENT, Batch
from pipeinfer_dask.protocol.sampling import Sampling
from tests.tiny import make_tiny

TEXT = list(b"def main(arguments):")
DRAWS = 20_000
UNLIKELY = 0.001
"""The seeds are fixed: a test that passes once does so always."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("llama"), "llama", layers=2, seed=0, eos_token_id=10)


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Return how likely counts are at least so far from what is expected (Pearson's test)."""
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


# --- noise ------------------------------------------------------------------------------


def test_what_noise_a_token_gets_depends_on_seed_place_and_itself_alone() -> None:
    whole = gumbel_noise(1, 5, np.arange(1000))
    assert (gumbel_noise(1, 5, np.array([7, 900])) == whole[[7, 900]]).all()
    for other in (gumbel_noise(2, 5, np.arange(1000)), gumbel_noise(1, 6, np.arange(1000))):
        assert not np.intersect1d(other, whole).size
        assert abs(np.corrcoef(other, whole)[0, 1]) < 0.1


def test_noise_is_gumbels_over_tokens_and_over_places() -> None:
    over_tokens = gumbel_noise(3, 17, np.arange(DRAWS))
    over_places = np.array([gumbel_noise(3, place, np.array([17]))[0] for place in range(DRAWS)])
    for noise in (over_tokens, over_places):
        # In equal shares between the quantiles of the distribution function exp(-exp(-x)).
        shares = np.bincount((np.exp(-np.exp(-noise)) * 50).astype(int), minlength=50)
        assert p_value(torch.from_numpy(shares).double(), torch.full((50,), 1 / 50)) > UNLIKELY


# --- picks are draws ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 12),
        ({"temperature": 0.6}, 12),
        ({"top_k": 5}, 5),
        ({"top_p": 0.8, "temperature": 1.5}, 7),
        ({"top_k": 6, "top_p": 0.9, "min_p": 0.05}, 5),
    ],
)
def test_picks_are_distributed_as_the_softmax_of_the_processed_logits(
    settings: dict[str, Any], kept: int
) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4)) * 1.5
    sampler = Sampler(Sampling(seed=11, **settings))
    choice = sampler.choose(logits, 0, None)
    scores = choice.scores - gumbel_noise(11, 0, choice.tokens)
    counts = torch.zeros(12, dtype=torch.float64)
    for place in range(DRAWS):
        # What choose does when it has processed the logits, which are the same at each place here.
        picked = choice.tokens[(scores + gumbel_noise(11, place, choice.tokens)).argmax()]
        if place % 100 == 0:
            assert sampler.choose(logits, place, None).best == picked
        counts[picked] += 1
    processed = by_transformers(logits, settings)
    assert int(processed.isfinite().sum()) == kept
    assert p_value(counts, processed.double().softmax(0)) > UNLIKELY


def by_transformers(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    """Return the logits as transformers' own warpers leave them."""
    row: Any = logits[None]
    nothing: Any = None
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in settings:
            row = warper(settings[name])(nothing, row)
    processed: Tensor = row[0]
    return processed


PROCESSED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "all that truncates": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "top_p alone": {"top_p": 0.8},
    "rare ones": {"typical_p": 0.8, "epsilon_cutoff": 0.001, "eta_cutoff": 0.002},
    "top_h": {"top_h": 0.4, "top_k": 20},
    "against repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "top_k": 50},
    "biased": {
        "bad_words_ids": [[3], [101, 102], [10]],
        "sequence_bias": [[[7], 2.5], [[101, 9], -4.0]],
        "suppress_tokens": [1, 2],
        "min_new_tokens": 12,
    },
}


@pytest.mark.parametrize("settings", PROCESSED.values(), ids=PROCESSED.keys())
def test_logits_are_processed_as_generate_does(llama: Path, settings: dict[str, Any]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    config = GenerationConfig(
        do_sample=True, max_new_tokens=24, eos_token_id=10, **{"top_k": 0, **settings}
    )
    ids = torch.tensor([TEXT])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model.generate(
            ids,
            generation_config=config,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
    ours: dict[str, Any] = {
        name: tuple(map(tuple, value)) if name == "bad_words_ids" else value
        for name, value in settings.items()
    }
    if new := ours.pop("min_new_tokens", None):
        ours["min_length"] = len(TEXT) + new
    if pairs := ours.get("sequence_bias"):
        ours["sequence_bias"] = tuple((tuple(words), bias) for words, bias in pairs)
    sampler = Sampler(Sampling(seed=5, end_tokens=(10,), **ours))
    text = output.sequences[0].numpy()
    assert len(output.scores) > 10
    for step, (raw, processed) in enumerate(zip(output.logits, output.scores, strict=True)):
        place = len(TEXT) + step
        choice = sampler.choose(raw[0], place, text[:place])
        assert choice.tokens.tolist() == processed[0].isfinite().nonzero()[:, 0].tolist()
        noise = gumbel_noise(5, place, choice.tokens)
        torch.testing.assert_close(
            torch.from_numpy(choice.scores - noise),
            processed[0, choice.tokens].double(),
            atol=1e-6,
            rtol=1e-6,
        )


def test_top_k_keeps_what_ties_with_the_last() -> None:
    logits = torch.tensor([2.0, 1.0, 3.0, 1.0, 0.0, 1.0])
    choice = Sampler(Sampling(seed=0, top_k=3)).choose(logits, 0, None)
    assert choice.tokens.tolist() == [0, 1, 2, 3, 5]
    kept = by_transformers(logits, {"top_k": 3}).isfinite().nonzero()[:, 0]
    assert kept.tolist() == choice.tokens.tolist()


@pytest.mark.parametrize("seed", [None, 3])
def test_something_is_picked_where_nothing_may_be(seed: int | None) -> None:
    forbidden = Sampling(seed=seed, suppress_tokens=tuple(range(6)))
    assert Sampler(forbidden).choose(torch.zeros(6), 1, None).best in range(6)
    assert Sampler(Sampling(seed=seed)).choose(torch.full((6,), torch.nan), 1, None).best == 0


# --- the draft's view -------------------------------------------------------------------


def test_a_draft_agrees_more_often_with_the_same_noise() -> None:
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(1)) * 2
    near = logits + torch.randn(400, 50, generator=torch.Generator().manual_seed(2)) * 0.5
    target, lucky = Sampler(Sampling(seed=1)), Sampler(Sampling(seed=2))

    def agreement(sampler: Sampler) -> float:
        pairs = zip(logits, near, strict=True)
        same = [
            target.choose(ours, place, None).best == sampler.choose(theirs, place, None).best
            for place, (ours, theirs) in enumerate(pairs)
        ]
        return sum(same) / len(same)

    assert agreement(target) > 0.6
    assert agreement(lucky) < 0.4


def test_candidates_are_ranked_as_they_would_be_picked() -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1))
    choice = Sampler(Sampling(seed=4, top_k=3)).choose(logits, 9, None)
    candidates = choice.candidates(8)
    assert candidates[0][0] == choice.best
    assert {token for token, _ in candidates} == set(choice.tokens.tolist())
    confidences = [confidence for _, confidence in candidates]
    assert confidences == sorted(confidences, reverse=True)
    assert sum(confidences) == pytest.approx(1)


# --- on a shard ---------------------------------------------------------------------------


def test_each_branch_is_picked_for_by_its_own_text(llama: Path) -> None:
    shard = Shard.load(llama, range(2), capacity=64)
    sampling = Sampling(seed=8, temperature=1.5, repetition_penalty=1.8, logprobs=2)
    n = len(TEXT)
    # Two branches of two tokens behind the prompt.
    batch = Batch(
        (*TEXT, 65, 66, 67, 68),
        (*range(n), n, n, n + 1, n + 1),
        tuple(range(n + 4)),
        (NO_PARENT, *range(n - 1), n - 1, n - 1, n, n + 1),
    )
    output = shard.run(batch, None, picks=5, stopped=lambda: False, sampling=sampling)
    whole = Shard.load(llama, range(2), capacity=64)
    found = whole.candidates(batch, 5, width=2, stopped=lambda: False, sampling=sampling)
    assert output.tokens is not None and found is not None
    assert [candidates[0][0] for candidates in found] == list(output.tokens)

    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    ends: list[list[int]] = [[], [65], [66], [65, 67], [66, 68]]
    for end, token, probable in zip(ends, output.tokens, output.logprobs, strict=True):
        text = [*TEXT, *end]
        with torch.inference_mode():
            logits = model(torch.tensor([text])).logits[0, -1]
        choice = Sampler(sampling).choose(logits, len(text), np.array(text))
        assert choice.best == token
        log_softmax = logits.log_softmax(0)
        assert probable.token == pytest.approx(float(log_softmax[token]), abs=1e-4)
        best = log_softmax.topk(2)
        assert [name for name, _ in probable.best] == best.indices.tolist()
        assert [value for _, value in probable.best] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )


def test_log_probabilities_of_more_tokens_than_there_are_are_those_of_all() -> None:
    (found,) = logprobs(torch.zeros(1, 4), torch.tensor([2]), 9)
    assert found.token == pytest.approx(-np.log(4))
    assert sorted(token for token, _ in found.best) == [0, 1, 2, 3]
