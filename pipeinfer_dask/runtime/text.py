"""Text of the new tokens, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 8
"""Tokens to decode along with a new one: some tokenizers drop the space before a first word."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a character is decoded to while bytes of it are missing."""


class DecodedText:
    """A `TextStream` whose text continues the prompt's.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    prompt : sequence of int
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokens = list(prompt[-CONTEXT:])
        self._given = self._decode()

    def step(self, token: int) -> str | None:
        self._tokens.append(token)
        text = self._decode()
        return None if text.endswith(INCOMPLETE) else self._give(text)

    def flush(self) -> str:
        return self._give(self._decode())

    def _give(self, text: str) -> str:
        # A prompt may end within a character: then what it was decoded to is no prefix.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._given, text, strict=False))
        new = text[sum(1 for _ in same) :]
        del self._tokens[:-CONTEXT]
        self._given = self._decode()
        return new

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text
