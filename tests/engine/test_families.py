"""Unusual families, and pairs whose heads differ, through the whole pipeline in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeinfer_dask as pi
from tests.engine.pairs import LAYERS, NEW_TOKENS, PROMPT, greedy_tokens
from tests.families import FAMILIES
from tests.tiny import TINY_VOCABULARY, make_tiny

UNUSUAL = ("gpt_oss", "deepseek_v3", "llama4", "bloom", "gpt_neo", "falcon-new-decoder")


def make_family(path: Path, name: str, layers: int) -> Path:
    family, config = FAMILIES[name]
    return make_tiny(path, family, layers=layers, seed=0, **config)


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_family_generates_its_own_text_through_the_pipeline(
    name: str, tmp_path: Path
) -> None:
    target = make_family(tmp_path / "target", name, LAYERS)
    # The target itself drafts, so that its drafts are taken.
    with pi.Engine.from_pretrained(target, target, stages=3, in_process=True) as engine:
        result = engine.generate(PROMPT, max_new_tokens=80, strategy="adaptive")
        tree = engine.generate(PROMPT, max_new_tokens=80, strategy="speculative", depth=3)
    assert result.token_ids == tree.token_ids == greedy_tokens(target, PROMPT, 80)
    assert tree.metrics.accepted_tokens > 0


@pytest.mark.parametrize(("target_rows", "draft_rows"), [(400, 288), (288, 400)])
@pytest.mark.parametrize("strategy", ["speculative", "pipeinfer", "adaptive"])
def test_heads_of_different_sizes_leave_the_text_the_targets_own(
    target_rows: int, draft_rows: int, strategy: str, tmp_path: Path
) -> None:
    target = make_tiny(tmp_path / "t", "llama", layers=LAYERS, seed=0, padded_to=target_rows)
    draft = make_tiny(tmp_path / "d", "llama", layers=1, seed=1, padded_to=draft_rows)
    with pi.Engine.from_pretrained(target, draft, stages=2, in_process=True) as engine:
        result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, strategy=strategy)
    assert result.token_ids == greedy_tokens(target, PROMPT, NEW_TOKENS)
    # The target has picked what the draft model lacks, and was offered nothing that it lacks.
    beyond = [token for token in result.token_ids if token >= TINY_VOCABULARY]
    assert bool(beyond) == (target_rows > TINY_VOCABULARY)
    if strategy == "speculative":  # the others don't wait for a draft
        assert result.metrics.drafted_tokens > 0
