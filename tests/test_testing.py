"""Synthetic pairs: their size, their agreement, and a text that is no loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pipeinfer_dask as pi
from pipeinfer_dask.testing import ModelPair, make_pair

PROMPT = list(range(100, 132))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    torch.set_num_threads(1)
    return make_pair(tmp_path_factory.mktemp("pair"), parameters=1_200_000, agreement=0.6)


def test_the_dial_is_what_an_engine_then_sees(pair: ModelPair) -> None:
    assert pair.agreement == pytest.approx(0.6, abs=0.06)
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True) as engine:
        result = engine.generate(PROMPT, max_new_tokens=300, strategy="speculative", k=1)
    assert result.metrics.agreement_rate == pytest.approx(0.6, abs=0.12)


def test_the_text_repeats_nothing_that_a_lookup_could_find(pair: ModelPair) -> None:
    with pi.Engine.from_pretrained(pair.target, "ngram", stages=1, in_process=True) as engine:
        result = engine.generate(PROMPT, max_new_tokens=300, strategy="speculative", k=1)
    tokens = result.token_ids
    assert len({tuple(tokens[i : i + 3]) for i in range(298)}) > 280
    assert result.metrics.accepted_tokens < 15


def test_the_draft_is_the_targets_beginning_and_as_sure_as_it_is_right(pair: ModelPair) -> None:
    target, draft = (AutoModelForCausalLM.from_pretrained(path) for path in pair[:2])
    assert target.num_parameters() == pytest.approx(1_200_000, rel=0.3)
    assert target.dtype == torch.bfloat16
    assert len(draft.model.layers) == 1 < len(target.model.layers)
    theirs, ours = target.state_dict(), draft.state_dict()
    for name in ("model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head"):
        assert torch.equal(theirs[f"{name}.weight"], ours[f"{name}.weight"])
    ids = target.float().generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=200, attention_mask=None
    )
    with torch.inference_mode():
        confidence = draft.float()(ids).logits[0, len(PROMPT) :].softmax(-1).amax(-1).mean()
    assert float(confidence) == pytest.approx(0.6, abs=0.1)


def test_each_model_has_a_tokenizer(pair: ModelPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.draft)
    assert tokenizer.decode(tokenizer("def main")["input_ids"]) == "def main"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agreement": 0.99}, r"^expected an agreement between 0.05 and 0.95, got 0.99$"),
        ({"parameters": 1000}, r"^expected at least 200000 parameters, got 1000: ask for more$"),
    ],
)
def test_what_can_not_be_made_is_refused(
    tmp_path: Path, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_pair(tmp_path / "pair", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "pair").exists()
