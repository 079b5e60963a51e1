"""Text of the new tokens, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DecodedText:
    """A `TextStream` whose text continues the prompt's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        # Some tokenizers drop the space before a first word: let the prompt's end come first.
        self._before = list(prompt[-8:])
        self._stream = DecodeStream(ids=self._before, skip_special_tokens=True)
        self._tokens: list[int] = []
        self._length = 0

    def step(self, token: int) -> str | None:
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer, token)
        self._length += len(text or "")
        return text

    def flush(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._before, skip_special_tokens=True)
        whole: str = decode(self._before + self._tokens, skip_special_tokens=True)
        return whole[len(before) + self._length :]
