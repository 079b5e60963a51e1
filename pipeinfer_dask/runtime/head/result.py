"""What a generation gives: text piece by piece, the result, or the error that ended it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.protocol.sampling import Logprobs
from pipeinfer_dask.trace import Metrics, Trace
from pipeinfer_dask.trace.picture import result_html


class Piece(str):
    """Some text, as it came.

    Parameters
    ----------
    text : str
        What it says.
    origin : Origin
        Where its last token came from; an attribute, too.
    """

    origin: Origin
    __slots__ = ("origin",)

    def __new__(cls, text: str, origin: Origin) -> Piece:
        piece = super().__new__(cls, text)
        piece.origin = origin
        return piece


@dataclass(frozen=True)
class Result:
    """A finished generation.

    Attributes
    ----------
    text : str
        What was generated, without the prompt.
    token_ids : list of int
        The same as token ids, an end token included.
    origins : list of Origin
        Where each token came from.
    finish_reason : {"length", "end_token", "stop_string", "stopped"}
    strategy : str
    trace : Trace
    seed : int or None
        With which these very tokens can be sampled again; None for a greedy text.
    logprobs : list of Logprobs or None
        How probable each token was, if it was asked for.
    """

    text: str
    token_ids: list[int]
    origins: list[Origin]
    finish_reason: str
    strategy: str
    trace: Trace
    seed: int | None = None
    logprobs: list[Logprobs] | None = None

    @cached_property
    def metrics(self) -> Metrics:
        """The figures of this generation."""
        return self.trace.metrics()

    def _repr_html_(self) -> str:
        return result_html(self.trace, f"{self.strategy}, {self.finish_reason}")

    def __repr__(self) -> str:
        return (
            f"Result(strategy={self.strategy!r}, tokens={len(self.token_ids)}, "
            f"finish_reason={self.finish_reason!r}, text={self.text!r})"
        )


class GenerationInterrupted(RuntimeError):  # noqa: N818
    """The pipeline was lost before the text was finished.

    Another engine goes on with it: a text that starts from the prompt's token ids and
    ``partial_ids`` is the same from there on, a sampled one with the same settings and seed, too
    (but for ``min_new_tokens``, which counts from where it starts).

    Parameters
    ----------
    message : str
        What the pipeline was lost by.

    Attributes
    ----------
    partial : str
        The text so far.
    partial_ids : list of int
        The same as token ids.
    partial_logprobs : list of Logprobs or None
        How probable each of them was, if it was asked for.
    request : Request
        What was asked for: its ``prompt`` as token ids, ``max_new_tokens``, ``sampling.seed``.
    """

    def __init__(
        self,
        message: str,
        partial: str,
        partial_ids: list[int],
        request: Request,
        partial_logprobs: list[Logprobs] | None = None,
    ) -> None:
        super().__init__(message)
        self.partial = partial
        self.partial_ids = partial_ids
        self.request = request
        self.partial_logprobs = partial_logprobs

    def __reduce__(self) -> tuple[type[GenerationInterrupted], tuple[Any, ...]]:
        # An exception is made anew of its message alone, unless it says otherwise.
        made_of = self.partial, self.partial_ids, self.request, self.partial_logprobs
        return type(self), (str(self), *made_of)
