"""How a token is picked: what the last stage and the drafter are told, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of the pick after each token; names and meaning are those of transformers.

    The defaults change nothing. A pick is a function of these, of the text before it and of
    the seed: not of when or where it is made.

    Attributes
    ----------
    seed : int or None
        Of the noise that makes the picks random, in [0, 2**63). None: the best token is picked,
        and settings from ``temperature`` to ``eta_cutoff`` have no effect.
    temperature : float
        From 1e-6 to 1e6.
    top_k : int
        Only so many best tokens; 0 for all.
    top_p, typical_p : float
        In (0, 1]; 1 for all.
    top_h : float or None
        In (0, 1]; None for all.
    min_p, epsilon_cutoff, eta_cutoff : float
        In [0, 1], the latter two below 1; 0 for all.
    repetition_penalty : float
        From 1e-6 to 1e6, for tokens of the text so far, the prompt included.
    no_repeat_ngram_size : int
        0 for any.
    bad_words_ids : tuple of tuple of int
    sequence_bias : tuple of (tuple of int, float)
    suppress_tokens : tuple of int
    min_length : int
        No end token before the text, the prompt included, has so many tokens.
    end_tokens : tuple of int
    logprobs : int
        Report the log-probability of each picked token, and so many best ones beside it; 0 for
        none at all.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    seed: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    top_h: float | None = None
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    min_length: int = 0
    end_tokens: tuple[int, ...] = ()
    logprobs: int = 0

    def __post_init__(self) -> None:
        def expect(name: str, what: str, fits: bool) -> None:
            if not fits:
                raise ValueError(f"expected {name} {what}, got {getattr(self, name)}")

        if self.seed is not None:
            expect("seed", "from 0 to 2**63 - 1", 0 <= self.seed < 2**63)
        for name in ("temperature", "repetition_penalty"):
            # Beyond these, logits in 32 bits overflow.
            expect(name, "from 1e-6 to 1e6", 1e-6 <= getattr(self, name) <= 1e6)
        for name in ("top_k", "no_repeat_ngram_size", "min_length", "logprobs"):
            expect(name, "from 0 to 2**31 - 1", 0 <= getattr(self, name) < 2**31)
        for name in ("top_p", "typical_p"):
            expect(name, "above 0 and up to 1", 0 < getattr(self, name) <= 1)
        expect("top_h", "above 0 and up to 1", self.top_h is None or 0 < self.top_h <= 1)
        expect("min_p", "from 0 to 1", 0 <= self.min_p <= 1)
        for name in ("epsilon_cutoff", "eta_cutoff"):
            expect(name, "from 0 to below 1", 0 <= getattr(self, name) < 1)
        expect("bad_words_ids", "without an empty word", all(self.bad_words_ids))
        biases = [bias for words, bias in self.sequence_bias if words and bias <= 1e6]
        fits = len(biases) == len(self.sequence_bias)
        expect("sequence_bias", "as token ids, at least one, and a number of at most 1e6", fits)

    @property
    def looks_back(self) -> bool:
        """Whether a pick depends on more of the text than the model's own logits."""
        return (
            self.repetition_penalty != 1
            or self.no_repeat_ngram_size > 0
            or bool(self.bad_words_ids or self.sequence_bias)
            or self.min_length > 0
        )


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities after one token: the softmax of the target's raw logits.

    Attributes
    ----------
    token : float
        Of the token that was picked.
    best : tuple of (int, float)
        The most probable tokens and theirs, best first.
    """

    token: float
    best: tuple[tuple[int, float], ...]
