"""Every family, cut into stages, says what its own unsplit model says."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeinfer_dask.models.checkpoint import open_checkpoint
from pipeinfer_dask.models.families import SUPPORTED
from pipeinfer_dask.models.selftest import check_split
from pipeinfer_dask.models.stage import HiddenStates
from pipeinfer_dask.protocol.messages import Batch
from tests.families import FAMILIES
from tests.models.pipelines import (
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


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, config = FAMILIES[name]
    return make_tiny(
        tmp_path_factory.mktemp(name), model_type, layers=LAYERS, seed=1, norms=0.3, **config
    )


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model


def test_every_family_is_tested() -> None:
    assert {model_type for model_type, _ in FAMILIES.values()} == SUPPORTED


def test_a_familys_checkpoint_is_found_sound_and_passes_the_self_test(
    checkpoint: Path,
) -> None:
    found = open_checkpoint(checkpoint)
    assert (found.num_layers, found.hidden_size, found.vocab_size) == (LAYERS, 32, 288)
    assert found.context >= 512
    check_split(found)


def test_stages_hold_every_parameter_once_but_for_a_tied_head(
    checkpoint: Path, stock: PreTrainedModel
) -> None:
    embedding: Any = stock.get_input_embeddings()
    tied = embedding.weight.numel() if stock.all_tied_weights_keys else 0
    held = sum(stage.parameters for stage in load(checkpoint, 3))
    assert held == sum(parameter.numel() for parameter in stock.parameters()) + tied


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_prompt_in_chunks_has_the_logits_of_the_stock_model(
    checkpoint: Path, stock: PreTrainedModel, stages: int
) -> None:
    pipeline = load(checkpoint, stages)
    cuts = [0, 7, 14, 29, len(TEXT)]
    logits = [through(pipeline, linear(TEXT[a:b], a), b - a) for a, b in pairwise(cuts)]
    assert_same(torch.cat(logits), expected(stock, TEXT))


def test_a_checkpoint_of_16_bits_has_the_logits_of_the_stock_model_in_32_bits(
    name: str, tmp_path: Path
) -> None:
    model_type, config = FAMILIES[name]
    path = make_tiny(tmp_path, model_type, layers=LAYERS, seed=1, dtype=torch.float16, **config)
    plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert_same(through(load(path, 2), linear(TEXT), len(TEXT)), expected(plain, TEXT))


def test_two_branches_in_one_run_and_in_freed_slots_are_what_each_is_alone(
    checkpoint: Path, stock: PreTrainedModel
) -> None:
    pipeline = load(checkpoint, 3)
    n = len(TEXT)
    through(pipeline, linear(TEXT), 1)
    # Branch "wid" in slots n, n + 3, n + 2; branch "hei" in n + 1, n + 5, n + 4.
    tree = Batch(
        tuple(b"whiedi"),
        (n, n, n + 1, n + 1, n + 2, n + 2),
        (n, n + 1, n + 3, n + 5, n + 2, n + 4),
        (n - 1, n - 1, n, n + 1, n + 3, n + 5),
    )
    logits = through(pipeline, tree, 6)
    assert_same(logits[0::2], expected(stock, (*TEXT, *b"wid"))[n:])
    assert_same(logits[1::2], expected(stock, (*TEXT, *b"hei"))[n:])
    # The first branch is pruned; the second one goes on in its slots.
    more = Batch(tuple(b"ght"), (n + 3, n + 4, n + 5), (n, n + 2, n + 3), (n + 4, n, n + 2))
    logits = through(pipeline, more, 3)
    assert_same(logits, expected(stock, (*TEXT, *b"height"))[n + 3 :])


def test_a_hundred_greedy_tokens_are_those_of_generate(
    checkpoint: Path, stock: PreTrainedModel
) -> None:
    pipeline = load(checkpoint, 3)
    tokens, batch = list(TEXT), linear(TEXT)
    while len(tokens) < len(TEXT) + 100:
        hidden: HiddenStates | None = None
        for stage in pipeline:
            output = stage.run(batch, hidden, picks=1, stopped=never)
            hidden = output.hidden
        assert output.tokens is not None
        batch = linear(output.tokens, len(tokens))
        tokens += output.tokens
    plain: Any = stock
    generated = plain.generate(torch.tensor([TEXT]), max_new_tokens=100, do_sample=False)
    assert tokens == generated[0].tolist()
