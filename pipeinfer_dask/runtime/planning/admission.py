"""What may be asked of a pair of models: checked here, before any worker hears of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeinfer_dask.models.checkpoint import Checkpoint
from pipeinfer_dask.policies import Policy, policy_of
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.protocol.sampling import Sampling
from pipeinfer_dask.runtime.planning.settings import (
    count,
    ids,
    requested,
    sampling_of,
    stated,
    texts,
    whole,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 64
"""Tokens to generate where nobody says how many."""

SPECULATIVE_SLOTS = 1024
"""Slots of each KV cache beyond the text itself: room for drafts at any one time."""


@dataclass(frozen=True)
class Admission:
    """Turns what a user asks for into a request and a policy, or says what is wrong with it.

    Attributes
    ----------
    target : Checkpoint
    tokenizer : PreTrainedTokenizerBase
    has_draft : bool
        Whether there is a draft model.
    draft_apart : bool
        Whether the draft model is on a machine that holds no stage.
    shares_cores : bool
        Whether stages and draft model all compute on the same cores.
    """

    target: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    has_draft: bool
    draft_apart: bool = False
    shares_cores: bool = False

    def policy(self, strategy: str | Policy | None, knobs: Mapping[str, Any]) -> Policy:
        """Return a fresh policy.

        Raises
        ------
        ValueError
            If strategy and knobs are not to be had, or need a draft model that is not there.
        """
        default = "adaptive" if self.has_draft else "iterative"
        policy = policy_of(default if strategy is None else strategy, knobs)
        if policy.needs_draft and not self.has_draft:
            raise ValueError(
                f"strategy {policy.name!r} needs a draft model: give one as draft, or use "
                f"strategy 'iterative'"
            )
        return policy

    @cached_property
    def stated(self) -> tuple[dict[str, Any], list[str]]:
        """What the target's generation_config.json asks for and we do, and what we don't do."""
        ours, beyond = stated(self.target.generation_config)
        try:
            self._sampling({"do_sample": True, **ours}, {}, 1, None, 0)
            texts("stop_strings", ours.get("stop_strings", ()))
        except ValueError as error:
            file = self.target.path / "generation_config.json"
            raise ValueError(f"{file} can't be used: {error}") from error
        return ours, beyond

    def request(
        self,
        number: int,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = None,
        *,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        seed: int | None = None,
        logprobs: int = 0,
        cache: int | None = None,
        **settings: Any,
    ) -> Request:
        """Return the request of this number; the rest is what `Engine.start` takes.

        Raises
        ------
        ValueError
            If the prompt is empty or holds an unknown token, prompt and new tokens are
            longer than the model's context, or a setting is not to be had.
        """
        tokens = self._tokens(prompt)
        asked = requested(generation_config, settings)
        if max_new_tokens is None:
            max_new_tokens = asked.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        max_new_tokens = whole("max_new_tokens", max_new_tokens)
        if max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        least = count("min_new_tokens", asked.get("min_new_tokens", 0))
        if least > max_new_tokens:
            raise ValueError(
                f"expected min_new_tokens of at most max_new_tokens, which is {max_new_tokens}, "
                f"got {least}"
            )
        if len(tokens) + max_new_tokens > self.target.context:
            shorter = "shorten the prompt" if cache is None else "undo() a turn, begin another chat"
            raise ValueError(
                f"expected prompt and new tokens to fit the model's context of "
                f"{self.target.context}, got {len(tokens)} + {max_new_tokens}: {shorter} or ask "
                f"for fewer tokens"
            )
        return Request(
            id=number,
            prompt=tokens,
            max_new_tokens=max_new_tokens,
            capacity=len(tokens) + max_new_tokens + SPECULATIVE_SLOTS,
            end_tokens=self._end_tokens(asked),
            reads_ahead=self.draft_apart,
            shares_cores=self.shares_cores,
            sampling=self._sampling(asked, self.stated[0], len(tokens), seed, logprobs),
            stop_strings=texts("stop_strings", (self.stated[0] | asked).get("stop_strings", ())),
            cache=cache,
        )

    def _end_tokens(self, asked: Mapping[str, Any]) -> frozenset[int]:
        ends = asked.get("eos_token_id")
        if ends is None:
            return frozenset(self.target.eos_token_ids)
        listed = [ends] if isinstance(ends, int) else ends
        return frozenset(ids("eos_token_id", listed, self.target.vocab_size))

    def _sampling(
        self,
        asked: Mapping[str, Any],
        defaults: Mapping[str, Any],
        prompt_length: int,
        seed: int | None,
        logprobs: int,
    ) -> Sampling | None:
        return sampling_of(
            asked,
            defaults,
            prompt_length=prompt_length,
            vocab_size=self.target.vocab_size,
            end_tokens=self._end_tokens(asked),
            seed=seed,
            logprobs=logprobs,
        )

    def _tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        length = None
        with suppress(TypeError):  # some that could have a length, such as a lone number, have none
            length = len(prompt)
        if length is None or isinstance(prompt, (bytes, Mapping, Set)):
            raise ValueError(f"expected a prompt as text or token ids, got {prompt!r}")
        if length == 0:
            raise ValueError("expected a prompt of at least one token, got an empty one")
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"expected a prompt that is valid Unicode text, got one that is not ({error}): "
                    "save it as UTF-8"
                ) from None
            tokens = tuple(self.tokenizer(prompt, verbose=False)["input_ids"])
        else:
            tokens = tuple(_token(token) for token in prompt)
        if not tokens:
            raise ValueError("expected a prompt of at least one token, got none from the tokenizer")
        size = self.target.vocab_size
        if unknown := [token for token in tokens if not 0 <= token < size]:
            raise ValueError(
                f"expected token ids from 0 to {size - 1}, got {unknown[0]}: was this text "
                f"tokenized for another model?"
            )
        return tokens


def _token(given: object) -> int:
    if not isinstance(given, bool):
        with suppress(TypeError):
            return operator.index(given)  # type: ignore[arg-type]
    raise ValueError(
        f"expected token ids as whole numbers, got {given!r:.60}: encode text by the tokenizer, or "
        "start a generation for each prompt"
    )
