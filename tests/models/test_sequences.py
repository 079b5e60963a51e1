"""Several texts on one shard: each has a KV cache of its own."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.protocol.sampling import Sampling
from tests.models.pipelines import CAPACITY, LAYERS, TEXT, linear, never
from tests.tiny import make_tiny

OTHER = TEXT[::-1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("llama"), "llama", layers=LAYERS, seed=2)


def shard_of(path: Path, *, static: bool = False) -> Shard:
    return Shard.load(path, range(LAYERS), capacity=CAPACITY, static=static)


def alone(path: Path, text: bytes) -> torch.Tensor:
    logits = shard_of(path).logits(linear(text), len(text), never)
    assert logits is not None
    return logits


@pytest.mark.parametrize("static", [False, True])
def test_texts_by_turns_are_what_they_are_alone(llama: Path, static: bool) -> None:
    shard = shard_of(llama, static=static)
    texts = {5: bytes(TEXT), 9: bytes(OTHER)}
    got: dict[int, list[torch.Tensor]] = {cache: [] for cache in texts}
    for place in range(0, len(TEXT), 3):
        for cache, text in texts.items():
            batch = linear(text[place : place + 3], place)
            logits = shard.logits(batch, len(batch), never, cache=cache)
            assert logits is not None
            got[cache].append(logits.clone())
    for cache, text in texts.items():
        torch.testing.assert_close(torch.cat(got[cache]), alone(llama, text), rtol=1e-4, atol=1e-4)


def test_settings_of_one_text_leave_the_others_alone(llama: Path) -> None:
    """What looks back on the text looks at its own."""
    shard, forgetful = shard_of(llama), Sampling(no_repeat_ngram_size=1)
    for cache, text in ((1, TEXT), (2, OTHER[:4])):
        shard.run(linear(text), None, picks=1, stopped=never, sampling=forgetful, cache=cache)
    place = len(TEXT)
    batch = linear(b"a", place)
    token = shard.run(batch, None, picks=1, stopped=never, sampling=forgetful, cache=1).tokens
    assert token is not None and token[0] not in {*TEXT, *b"a"}


def test_a_released_cache_serves_the_next_text(llama: Path) -> None:
    shard = shard_of(llama)
    shard.run(linear(TEXT), None, picks=1, stopped=never, cache=1)
    held = shard.cache_nbytes
    shard.release(1)
    shard.release(77)  # there is none
    logits = shard.logits(linear(OTHER), len(OTHER), never, cache=2)
    assert logits is not None
    torch.testing.assert_close(logits, alone(llama, bytes(OTHER)))
    assert shard.cache_nbytes == held
    shard.run(linear(TEXT), None, picks=1, stopped=never, cache=3)
    assert shard.cache_nbytes == 2 * held


def test_a_shard_that_is_let_go_of_is_gone_at_once(llama: Path) -> None:
    shard = shard_of(llama)
    shard.run(linear(TEXT), None, picks=1, stopped=never)
    gone = weakref.ref(shard)
    gc.disable()
    try:
        del shard
        assert gone() is None
    finally:
        gc.enable()
