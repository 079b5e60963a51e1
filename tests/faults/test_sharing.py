"""A node is lost under several texts and a conversation at once."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

import pipeinfer_dask as pi
from pipeinfer_dask.bench.sabotage import Saboteur
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from tests.engine.pairs import PROMPT, Pair, greedy_tokens

PATIENCE_S = 60.0
ANSWER = 150


@pytest.mark.cluster
@pytest.mark.timeout(120)
def test_texts_and_a_conversation_go_on_together_after_a_stage_is_killed(pair: Pair) -> None:
    with ExitStack() as resources:
        client = own_cluster(3, resources, spares=1)
        engine = resources.enter_context(
            pi.Engine.from_pretrained(pair.target, pair.draft, client=client, stages=2, spares=1)
        )
        chat = resources.enter_context(engine.chat(template="plain"))
        said = list(engine.tokenizer("def main")["input_ids"])
        said += chat.send("def main", max_new_tokens=10).token_ids

        runs = [engine.start(PROMPT, max_new_tokens=200, strategy=s) for s in (None, "iterative")]
        answer = chat.start("and then?", max_new_tokens=ANSWER, strategy="iterative")
        for run in (*runs, answer):
            next(iter(run))
        Saboteur(client).kill("stage-0")

        results = [run.result(PATIENCE_S) for run in (*runs, answer)]
        assert all(result.metrics.losses for result in results)
        assert results[0].token_ids == results[1].token_ids == pair.greedy
        said += engine.tokenizer("and then?")["input_ids"]
        assert results[2].token_ids == greedy_tokens(pair.target, said, ANSWER)
        said += results[2].token_ids

        said += engine.tokenizer("return it")["input_ids"]
        last = chat.send("return it", max_new_tokens=20)
        assert last.token_ids == greedy_tokens(pair.target, said, 20)
        assert last.metrics.prefilled_tokens < 20  # the past is not read again
