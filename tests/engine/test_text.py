"""Text that comes token by token is the text that the tokens stand for."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeinfer_dask.runtime.head.text import DecodedText
from tests.engine.pairs import Pair
from tests.tiny import END_OF_TEXT

Read = Callable[[bytes, bytes], list[str]]


@pytest.fixture(scope="module")
def tokenizer(pair: Pair) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(pair.target)
    return tokenizer


@pytest.fixture(scope="module")
def read(tokenizer: PreTrainedTokenizerBase) -> Read:
    """Return the pieces that come of some bytes behind others, a token for each byte."""
    vocabulary = tokenizer.get_vocab()
    # A byte-level vocabulary writes printable bytes as Latin-1, and numbers the others.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    written = [chr(byte if byte in printable else next(others)) for byte in range(0x100)]
    token_of = [vocabulary[symbol] for symbol in written]

    def read(prompt: bytes, new: bytes) -> list[str]:
        stream = DecodedText(tokenizer, [token_of[byte] for byte in prompt])
        steps = [stream.step(token_of[byte]) for byte in new]
        return [piece for piece in (*steps, stream.flush()) if piece]

    return read


def test_a_character_comes_when_its_last_byte_has_come(read: Read) -> None:
    assert read(b"hi ", "日本 é!".encode()) == ["日", "本", " ", "é", "!"]


def test_a_prompt_may_end_within_a_character(read: Read) -> None:
    assert read("日".encode()[:2], "日本".encode()[2:]) == ["日", "本"]


def test_a_text_may_end_within_a_character(read: Read) -> None:
    assert read(b"hi ", "a日".encode()[:3]) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_bytes_that_are_no_text_are_shown_as_such_once(read: Read) -> None:
    replaced = "\N{REPLACEMENT CHARACTER}"
    assert read(b"\xff" * 9, b"\xffa") == [f"{replaced}a"]
    assert "".join(read(b"", b"a\xff\xc3b\xe6\x97")) == f"a{replaced}{replaced}b{replaced}"


@given(prompt=st.text(max_size=20), new=st.text(max_size=20))
def test_the_pieces_make_up_the_text(read: Read, prompt: str, new: str) -> None:
    assert "".join(read(prompt.encode(), new.encode())) == new


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = DecodedText(tokenizer, [])
    assert not stream.step(tokenizer.get_vocab()[END_OF_TEXT])
    assert stream.flush() == ""
