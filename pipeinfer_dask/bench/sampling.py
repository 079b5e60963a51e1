"""What a sampled pick costs, and how much more often a draft agrees that shares the noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeinfer_dask.models.demo_pair import demo_pair
from pipeinfer_dask.models.sampling import Sampler
from pipeinfer_dask.protocol.sampling import Sampling

TEXT_TOKENS = 2048
"""Tokens before the pick, for what looks back."""
SETTINGS = {
    "temperature": Sampling(seed=0, temperature=0.8),
    "top_k": Sampling(seed=0, temperature=0.8, top_k=50),
    "top_k, top_p, repetition_penalty": Sampling(
        seed=0, temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1
    ),
    "top_p": Sampling(seed=0, temperature=0.8, top_p=0.95),
}
PROMPTS = (
    *("def main", "class Reader:", "import os\n", "for i in range("),
    *("    return self.", "x = ["),
)


def run_sampling_bench(
    *,
    vocabulary: int = 151_936,
    repeats: int = 50,
    temperatures: Sequence[float] = (0.5, 0.8, 1.0),
    tokens: int = 150,
) -> dict[str, Any]:
    """Time picks of one token on one thread, and count how often the embedded draft agrees.

    Parameters
    ----------
    vocabulary : int
        Of normally distributed logits, with a standard deviation of 3.
    repeats : int
        Of which the median is taken.
    temperatures : sequence of float
    tokens : int
        Sampled from the embedded target after each of a few prompts.

    Returns
    -------
    dict
        ``{"suite": "sampling", "rows": [{"settings", "vocabulary", "ms", "transformers_ms",
        "ratio"}], "agreement": [{"temperature", "shared", "independent", "at_most", "tokens"}]}``.
        Milliseconds are those of the processor, whatever else it does. ``transformers_ms`` is
        what its own processors and `torch.multinomial` take, ``ratio`` ours by theirs. An
        agreement is the share of places where the draft's pick is the target's; no way to draw
        from both distributions agrees more often than ``at_most``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            rows = [_time(name, vocabulary, repeats) for name in SETTINGS]
            agreement = [_agreement(temperature, tokens) for temperature in temperatures]
    finally:
        torch.set_num_threads(threads)
    return {"suite": "sampling", "rows": rows, "agreement": agreement}


def _time(name: str, vocabulary: int, repeats: int) -> dict[str, Any]:
    sampling = SETTINGS[name]
    logits = 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    path = np.random.default_rng(0).integers(vocabulary, size=TEXT_TOKENS)
    text: Any = torch.from_numpy(path)[None]
    sampler = Sampler(sampling)
    stock = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        stock.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    stock.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        stock.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        stock.append(TopPLogitsWarper(sampling.top_p))

    def theirs() -> None:
        row: Any = logits[None]
        torch.multinomial(stock(text, row).softmax(-1), 1)

    ours_ms = _median_ms(lambda: sampler.choose(logits, TEXT_TOKENS, path).best, repeats)
    theirs_ms = _median_ms(theirs, repeats)
    return {
        "settings": name,
        "vocabulary": vocabulary,
        "ms": round(ours_ms, 3),
        "transformers_ms": round(theirs_ms, 3),
        "ratio": round(ours_ms / theirs_ms, 3),
    }


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        call()
        times.append(1e3 * (time.thread_time() - began))
    return statistics.median(times)


def _agreement(temperature: float, tokens: int) -> dict[str, Any]:
    pair = demo_pair()
    target: Any = AutoModelForCausalLM.from_pretrained(pair.target)
    draft: Any = AutoModelForCausalLM.from_pretrained(pair.draft)
    tokenizer: Any = AutoTokenizer.from_pretrained(pair.target)
    sampling = Sampling(seed=0, temperature=temperature)
    shared = independent = at_most = 0.0
    for seed, prompt in enumerate(PROMPTS):
        sampler = Sampler(replace(sampling, seed=seed))
        text: list[int] = tokenizer(prompt)["input_ids"]
        given = len(text)
        rows, cache, new = [], None, text
        for _ in range(tokens):
            output = target(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1])
            new = [sampler.choose(rows[-1], len(text), None).best]
            text = text + new
        guesses = draft(torch.tensor([text[:-1]])).logits[0, given - 1 :]
        for place, (ours, guess) in enumerate(zip(rows, guesses, strict=True), start=given):
            picked = sampler.choose(guess, place, None)
            shared += picked.best == text[place]
            p, q = ((row.double() / temperature).softmax(0) for row in (ours, guess))
            independent += float((p * q).sum())
            at_most += float(torch.minimum(p, q).sum())
    count = tokens * len(PROMPTS)
    return {
        "temperature": temperature,
        "shared": round(shared / count, 3),
        "independent": round(independent / count, 3),
        "at_most": round(at_most / count, 3),
        "tokens": count,
    }
