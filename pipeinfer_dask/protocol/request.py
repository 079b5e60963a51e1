"""What a machine is asked to generate."""

from __future__ import annotations

from dataclasses import dataclass

from pipeinfer_dask.protocol.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate.

    Attributes
    ----------
    id : int
    prompt : tuple of int
        At least one token id.
    max_new_tokens : int
    capacity : int
        Slots in each KV cache, at least prompt and new tokens together. What is
        above that is room for speculation.
    end_tokens : frozenset of int
        The text ends after any of these.
    prefill_chunk : int
        Most prompt tokens in one run: several let the stages overlap.
    reads_ahead : bool
        Whether the draft model may read a long prompt while the target does. Only where it has
        cores of its own: elsewhere the first token would be late.
    sampling : Sampling, optional
        How tokens are picked; without it the most probable one, always.
    stop_strings : tuple of str
        The text ends with the token that completes any of these.
    shares_cores : bool
        Whether stages and draft model all compute on the same cores: then nothing is gained
        by having several of them at work at once.
    cache : int, optional
        The KV cache to use on all stages and on the drafter: by default one of its own, of the
        request's number.
    """

    id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    capacity: int
    end_tokens: frozenset[int] = frozenset()
    prefill_chunk: int = 128
    reads_ahead: bool = False
    sampling: Sampling | None = None
    stop_strings: tuple[str, ...] = ()
    shares_cores: bool = False
    cache: int | None = None

    @property
    def cache_id(self) -> int:
        """The KV cache's number."""
        return self.id if self.cache is None else self.cache

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, not {self.prefill_chunk}")
        if self.capacity < (needed := len(self.prompt) + self.max_new_tokens):
            raise ValueError(
                f"prompt and new tokens need {needed} slots, but there are {self.capacity}"
            )
