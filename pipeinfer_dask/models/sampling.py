"""Picks tokens from logits: transformers' processors, then the best of logits and keyed noise.

The best token of logits plus Gumbel noise is a draw from their softmax. The noise is a
function of the seed, the place in the text and the token alone, so whoever picks there draws
the same, however often and in whatever run; and a draft model that shares the noise picks
the target's token more often than one with luck of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pipeinfer_dask.protocol.sampling import Logprobs, Sampling

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def gumbel_noise(seed: int, position: int, tokens: Tokens) -> Floats:
    """Return standard Gumbel noise for tokens that may stand at a position of a text.

    Parameters
    ----------
    seed : int
    position : int
    tokens : ndarray of int64, [n]

    Returns
    -------
    ndarray of float64, [n]
        What a token gets does not depend on the others.
    """
    # SplitMix64, with the token as its counter: only what is kept of a vocabulary is drawn.
    bits = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64) + (
        tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    # 53 bits, and in the middle between two steps: neither 0 nor 1.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: Floats = -np.log(-np.log(uniform))
    return noise


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens that may stand somewhere.

    Attributes
    ----------
    tokens : ndarray of int64, [n]
        At least one, ascending.
    scores : ndarray of float64, [n]
        Processed logits, and noise if there is any: the best token has the highest.
    """

    tokens: Tokens
    scores: Floats

    @property
    def best(self) -> int:
        """The token that is picked."""
        return int(self.tokens[self.scores.argmax()])

    def candidates(self, width: int) -> list[tuple[int, float]]:
        """Return the best tokens, and how likely another model picks each.

        Returns
        -------
        list of (token, probability), at most ``width``, best first
        """
        scores = torch.from_numpy(self.scores)
        best = scores.softmax(dim=0).topk(min(width, len(scores)))
        tokens = self.tokens[best.indices.numpy()]
        return list(zip(tokens.tolist(), best.values.tolist(), strict=True))


class Sampler:
    """Picks tokens as a `Sampling` says.

    Parameters
    ----------
    sampling : Sampling
    vocab_size : int, optional
        Of the model, where it may be smaller than the target's whose tokens the settings name.
    """

    def __init__(self, sampling: Sampling, vocab_size: int | None = None) -> None:
        self.sampling = sampling
        self._processors = _processors(sampling, vocab_size)
        # Temperature before top_k and the rest after it, as in transformers.
        self._top_k = sampling.top_k if sampling.seed is not None else 0
        self._warpers = _warpers(sampling) if sampling.seed is not None else LogitsProcessorList()

    def choose(self, logits: Tensor, position: int, path: Tokens | None) -> Choice:
        """Process the logits for one place in the text.

        Parameters
        ----------
        logits : Tensor, [vocab_size]
            As the model gives them.
        position : int
            The place in the text of the token to pick.
        path : ndarray of int64, [position], or None
            The tokens before it; needed where the sampling looks back.
        """
        text: Any = torch.from_numpy(path)[None] if path is not None else None
        row: Tensor = self._processors(text, logits.float()[None])
        tokens: Tensor | None = None
        if 0 < self._top_k < row.shape[-1]:
            # What top_k leaves out is gone for the rest, which then sorts k and not the vocabulary.
            least = row.topk(self._top_k).values[0, -1]
            tokens = (row[0] >= least).nonzero()[:, 0]
            row = row[:, tokens]
        scores: Floats = self._warpers(text, row)[0].double().numpy()
        (kept,) = np.isfinite(scores).nonzero()
        if not len(kept):
            # All is forbidden; or a cancelled run attends to nothing real, and nobody looks.
            kept, scores = np.zeros(1, np.int64), np.zeros(1)
        ids = kept if tokens is None else tokens.numpy()[kept]
        scores = scores[kept]
        if self.sampling.seed is not None:
            scores = scores + gumbel_noise(self.sampling.seed, position, ids)
        return Choice(ids, scores)


def logprobs(logits: Tensor, tokens: Tensor, count: int) -> list[Logprobs]:
    """Return how probable picked tokens are by the model's own logits.

    Parameters
    ----------
    logits : Tensor, [picks, vocab_size]
    tokens : Tensor of int64, [picks]
    count : int
        Of the most probable tokens to name beside each.
    """
    probable = logits.float().log_softmax(dim=-1)
    picked = probable.gather(1, tokens[:, None])[:, 0].tolist()
    best = probable.topk(min(count, probable.shape[-1]))
    rows = zip(picked, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Logprobs(token, tuple(zip(names, values, strict=True))) for token, names, values in rows
    ]


def _processors(sampling: Sampling, vocab_size: int | None) -> LogitsProcessorList:
    """Return what is applied to the whole vocabulary, in the order of `generate`."""

    def known(words: tuple[int, ...]) -> bool:
        return vocab_size is None or max(words) < vocab_size

    listed = LogitsProcessorList()
    biases: Any = {words: float(bias) for words, bias in sampling.sequence_bias if known(words)}
    if biases:
        listed.append(SequenceBiasLogitsProcessor(biases))
    if sampling.repetition_penalty != 1:
        listed.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.no_repeat_ngram_size:
        listed.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    # An end token is no bad word, as in transformers, which has none left then and complains.
    ends = {(token,) for token in sampling.end_tokens}
    if bad := [list(words) for words in {*sampling.bad_words_ids} - ends if known(words)]:
        listed.append(NoBadWordsLogitsProcessor(bad))
    if sampling.min_length and sampling.end_tokens:
        listed.append(MinLengthLogitsProcessor(sampling.min_length, list(sampling.end_tokens)))
    if sampling.suppress_tokens:
        listed.append(SuppressTokensLogitsProcessor(sampling.suppress_tokens))
    if sampling.seed is not None:
        if sampling.temperature != 1:
            listed.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_h is not None:
            listed.append(TopHLogitsWarper(sampling.top_h))
    return listed


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """Return what comes behind top_k and looks at what that leaves alone."""
    listed = LogitsProcessorList()
    if sampling.top_p < 1:
        listed.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p > 0:
        listed.append(MinPLogitsWarper(float(sampling.min_p)))
    if sampling.typical_p < 1:
        listed.append(TypicalLogitsWarper(float(sampling.typical_p)))
    if sampling.epsilon_cutoff > 0:
        listed.append(EpsilonLogitsWarper(float(sampling.epsilon_cutoff)))
    if sampling.eta_cutoff > 0:
        listed.append(EtaLogitsWarper(float(sampling.eta_cutoff)))
    return listed
