from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeinfer_dask.models.layers import split_layers
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.tensors import Reading, StoredTensor
from pipeinfer_dask.protocol.messages import NO_PARENT, Batch
from pipeinfer_dask.protocol.sampling import Sampling
from tests.models.pipelines import (
    CAPACITY,
    LAYERS,
    TEXT,
    assert_same,
    expected,
    linear,
    load,
    never,
    through,
)
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("llama"), "llama", layers=LAYERS, seed=2)


def test_a_second_text_needs_no_reset(llama: Path) -> None:
    shard = Shard.load(llama, range(LAYERS), capacity=CAPACITY)
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert_same(through([shard], linear(TEXT), 1), expected(model, TEXT)[-1:])
    assert_same(through([shard], linear(TEXT[::-1]), 1), expected(model, TEXT[::-1])[-1:])


def test_a_stage_reads_and_holds_its_own_tensors_only(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[StoredTensor] = []
    fetch = Reading.tensor

    def record(self: Reading, stored: StoredTensor) -> torch.Tensor:
        read.append(stored)
        return fetch(self, stored)

    monkeypatch.setattr(Reading, "tensor", record)
    layer = [
        f"model.layers.1.{name}.weight"
        for name in (
            "input_layernorm",
            *(f"mlp.{part}_proj" for part in ("down", "gate", "up")),
            "post_attention_layernorm",
            *(f"self_attn.{part}_proj" for part in "koqv"),
        )
    ]
    middle = Shard.load(llama, range(1, 2), capacity=CAPACITY)
    assert sorted(tensor.name for tensor in read) == layer
    assert middle.parameters * 4 == sum(tensor.nbytes for tensor in read)
    read.clear()
    Shard.load(llama, range(1), capacity=CAPACITY)
    assert [tensor.name for tensor in read if "layers" not in tensor.name] == [
        "model.embed_tokens.weight"
    ]
    read.clear()
    Shard.load(llama, range(3, 4), capacity=CAPACITY)
    assert sorted(tensor.name for tensor in read if "layers" not in tensor.name) == [
        "lm_head.weight",
        "model.norm.weight",
    ]


def test_a_tied_embedding_is_on_the_first_stage_and_on_the_last(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "llama", layers=3, seed=1, tie_word_embeddings=True)
    embedding, norm = 288 * 32, 32
    layer = 2 * 32 + 3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16
    held = [Shard.load(path, range(i, i + 1), capacity=8).parameters for i in range(3)]
    assert held == [embedding + layer, layer, embedding + layer + norm]


def test_weights_in_several_files_of_16_bits_are_computed_in_32_bits(tmp_path: Path) -> None:
    path = make_tiny(
        tmp_path, "llama", layers=LAYERS, seed=1, dtype=torch.bfloat16, max_shard_size="20KB"
    )
    assert len(list(path.glob("*.safetensors"))) > 1
    pipeline = load(path, 2)
    hidden = pipeline[0].run(linear(TEXT), None, picks=1, stopped=never).hidden
    assert hidden is not None
    assert hidden.dtype == np.dtype("float32")
    assert hidden.shape == (len(TEXT), 32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert_same(through(pipeline, linear(TEXT), 1), expected(model, TEXT)[-1:])


@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_a_run_that_nobody_wants_ends_before_its_next_layer(llama: Path, wanted: int) -> None:
    answers = iter([False] * wanted + [True])
    shard = Shard.load(llama, range(LAYERS), capacity=CAPACITY)
    output = shard.run(linear(TEXT), None, picks=1, stopped=lambda: next(answers))
    assert (output.hidden, output.tokens, output.layers) == (None, None, wanted)


def test_runs_after_a_stopped_one_are_right(llama: Path) -> None:
    pipeline = load(llama, 2)
    through(pipeline, linear(TEXT), 1)
    # Stopped on the first stage, and never seen by the second one.
    pipeline[0].run(linear(b"abc", len(TEXT)), None, picks=3, stopped=lambda: True)
    model = AutoModelForCausalLM.from_pretrained(llama)
    logits = through(pipeline, linear(b"xyz", len(TEXT)), 3)
    assert_same(logits, expected(model, (*TEXT, *b"xyz"))[-3:])


def test_a_run_that_builds_on_a_skipped_one_is_computed_though_nobody_will_look(
    llama: Path,
) -> None:
    shard = Shard.load(llama, range(LAYERS), capacity=CAPACITY)
    output = shard.run(linear(b"ab", 20), None, picks=2, stopped=never)
    assert output.tokens is not None
    assert len(output.tokens) == 2


def test_a_run_without_picks_fills_the_cache_and_picks_nothing(llama: Path) -> None:
    shard = Shard.load(llama, range(LAYERS), capacity=CAPACITY)
    output = shard.run(linear(TEXT[:-1]), None, picks=0, stopped=never)
    assert (output.tokens, output.layers) == ((), LAYERS)
    model = AutoModelForCausalLM.from_pretrained(llama)
    logits = through([shard], linear(TEXT[-1:], len(TEXT) - 1), 1)
    assert_same(logits, expected(model, TEXT)[-1:])


def test_hidden_states_may_lie_in_memory_that_is_read_only(llama: Path) -> None:
    pipeline = load(llama, 2)
    sent = pipeline[0].run(linear(TEXT), None, picks=1, stopped=never).hidden
    assert sent is not None
    received = np.frombuffer(sent.tobytes(), dtype=np.float32).reshape(sent.shape)
    output = pipeline[1].run(linear(TEXT), received, picks=1, stopped=never)
    again = pipeline[1].run(linear(TEXT), sent, picks=1, stopped=never)
    assert output.tokens == again.tokens


@pytest.mark.parametrize("longest_pass", [128, 3])
def test_a_whole_model_tells_what_may_come_next_and_how_probable_it_is(
    llama: Path, longest_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeinfer_dask.models.shard.LONGEST_PASS", longest_pass)
    shard = Shard.load(llama, range(LAYERS), capacity=CAPACITY)
    candidates = shard.candidates(linear(TEXT), 2, width=3, stopped=never)
    assert candidates is not None
    model = AutoModelForCausalLM.from_pretrained(llama)
    for found, logits in zip(candidates, expected(model, TEXT)[-2:], strict=True):
        best = logits.softmax(-1).topk(3)
        assert [token for token, _ in found] == best.indices.tolist()
        assert [confidence for _, confidence in found] == pytest.approx(best.values.tolist(), 1e-4)
    assert shard.candidates(linear(TEXT), 2, width=3, stopped=lambda: True) is None


def test_a_draft_model_proposes_no_token_that_the_target_lacks(llama: Path) -> None:
    whole, bound = (
        Shard.load(llama, range(LAYERS), capacity=CAPACITY, target_vocab_size=size)
        for size in (None, 200)
    )
    n = len(TEXT)
    free, kept = (
        shard.candidates(linear(TEXT), n, width=3, stopped=never) for shard in (whole, bound)
    )
    assert free is not None
    assert kept is not None
    assert any(token >= 200 for choices in free for token, _ in choices)
    assert all(token < 200 for choices in kept for token, _ in choices)


def test_a_draft_model_that_is_asked_for_more_tokens_than_there_are_tells_all(llama: Path) -> None:
    shard = Shard.load(llama, range(LAYERS), capacity=CAPACITY, target_vocab_size=200)
    for sampling in (None, Sampling(seed=1)):
        candidates = shard.candidates(linear(TEXT), 1, width=999, stopped=never, sampling=sampling)
        assert candidates is not None
        assert sorted(token for token, _ in candidates[0]) == list(range(200))


def test_a_draft_model_goes_on_after_a_token_that_only_the_target_has(llama: Path) -> None:
    shard = Shard.load(llama, range(LAYERS), capacity=CAPACITY, target_vocab_size=1000)
    candidates = shard.candidates(linear((*TEXT, 288, 999)), 2, width=2, stopped=never)
    assert candidates is not None
    assert [len(choices) for choices in candidates] == [2, 2]


def test_a_draft_model_goes_on_beyond_its_own_context(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "gpt2", layers=1, seed=1, max_position_embeddings=16)
    shard = Shard.load(path, range(1), capacity=CAPACITY)
    candidates = shard.candidates(linear(TEXT), 3, width=1, stopped=never)
    assert candidates is not None
    assert [len(choices) for choices in candidates] == [1, 1, 1]


def test_shards_that_load_in_threads_at_once_are_sound(llama: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        shares = split_layers(LAYERS, 4)
        pipeline = list(threads.map(lambda share: Shard.load(llama, share, capacity=50), shares))
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert_same(through(pipeline, linear(TEXT), 1), expected(model, TEXT)[-1:])


def test_the_cache_holds_only_the_owned_layers_and_grows_to_its_capacity(llama: Path) -> None:
    shard = Shard.load(llama, range(1, 3), capacity=100)
    hidden = np.zeros((1, 32), np.float32)
    slot_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes
    for slot, slots_held in ((0, 64), (63, 64), (64, 100), (99, 100)):
        run = Batch((1,), (0,), (slot,), (NO_PARENT,))
        shard.run(run, hidden, picks=1, stopped=never)
        assert shard.cache_nbytes == slots_held * slot_bytes


def test_a_slot_beyond_the_capacity_is_refused(llama: Path) -> None:
    shard = Shard.load(llama, range(LAYERS), capacity=10)
    with pytest.raises(ValueError, match="slot 10 is beyond the KV cache's capacity of 10"):
        shard.run(linear(TEXT[:11]), None, picks=1, stopped=never)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (range(5), {}, "has layers 0 to 3"),
        (range(2, 2), {}, "has layers 0 to 3"),
        (range(0, 4, 2), {}, "has layers 0 to 3"),
        (range(4), {"capacity": 0}, "at least 1 slot, not 0"),
        (range(4), {"weights": "int4"}, "one of 'auto', 'fp16', 'fp32', got 'int4'"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(
    llama: Path, layers: range, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Shard.load(llama, layers, **{"capacity": 8, **options})


def test_a_missing_tensor_is_an_error_and_never_random(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "llama", layers=2, seed=1)
    config = path / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.2"):
        Shard.load(path, range(3), capacity=8)


def test_a_stage_says_what_hidden_states_it_takes(llama: Path) -> None:
    first, last = load(llama, 2)
    with pytest.raises(ValueError, match=r"take hidden states of \(2, 32\); nothing came"):
        last.run(linear(TEXT[:2]), None, picks=1, stopped=never)
    with pytest.raises(ValueError, match=r"of \(2, 32\); shape \(3, 32\) came"):
        last.run(linear(TEXT[:2]), np.zeros((3, 32), np.float32), picks=1, stopped=never)
    with pytest.raises(ValueError, match="only the last stage has logits"):
        first.logits(linear(TEXT), 1, never)
