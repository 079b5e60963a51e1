"""Text of the new tokens, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from pipeinfer_dask.protocol.request import Request

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
    special : bool
        Whether special tokens are a part of the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], *, special: bool = False
    ) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._special = special
        self._tokens = list(prompt[-CONTEXT:])
        self._given = self._decode()

    def step(self, token: int) -> str | None:
        self._tokens.append(token)
        text = self._decode()
        return None if text.endswith(INCOMPLETE) else self._give(text)

    @property
    def unfinished(self) -> str:
        """Text that has not been given because more bytes of its last character are to come."""
        return self._new(self._decode()).rstrip(INCOMPLETE)

    def flush(self) -> str:
        return self._give(self._decode())

    def _give(self, text: str) -> str:
        new = self._new(text)
        del self._tokens[:-CONTEXT]
        self._given = self._decode()
        return new

    def _new(self, text: str) -> str:
        # A prompt may end within a character: then what it was decoded to is no prefix.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._given, text, strict=False))
        return text[sum(1 for _ in same) :]

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=not self._special)
        return text


class StopStrings:
    """Tells which token completes a stop string, special tokens being text like any other.

    As in transformers, a stop string may begin in the prompt or in a token before, and other
    text may follow it in the token that completes it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    prompt : sequence of int
    strings : sequence of str
        None of them empty.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], strings: Sequence[str]
    ) -> None:
        self._stream = DecodedText(tokenizer, prompt, special=True)
        self._strings = strings
        self._before: str = tokenizer.backend_tokenizer.decode(
            list(prompt), skip_special_tokens=False
        )

    def __call__(self, token: int) -> bool:
        """Take the next token; return whether the text now holds a stop string."""
        given = self._stream.step(token)
        new = given or self._stream.unfinished
        found = any(
            string in self._before[len(self._before) - len(string) + 1 :] + new
            for string in self._strings
        )
        if given:
            self._before = (self._before + given)[-max(map(len, self._strings)) :]
        return found


def text_of(
    request: Request, tokenizer: PreTrainedTokenizerBase
) -> tuple[DecodedText, StopStrings | None]:
    """Return what turns a request's tokens into text, and what ends it by that text."""
    strings = request.stop_strings
    stops = StopStrings(tokenizer, request.prompt, strings) if strings else None
    return DecodedText(tokenizer, request.prompt), stops


class TokenTexts(dict[int, str]):
    """Single tokens as text, each decoded when it is first asked for.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._tokenizer = tokenizer.backend_tokenizer

    def __missing__(self, token: int) -> str:
        # Twice, less once: some tokenizers drop the space before a first word.
        once = self._tokenizer.decode([token], skip_special_tokens=False)
        twice = self._tokenizer.decode([token, token], skip_special_tokens=False)
        text: str = twice[len(once) :]
        self[token] = text
        return text
