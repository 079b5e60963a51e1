"""Runs that nobody needs are skipped, and counted by why nobody needs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pipeinfer_dask as pi
from pipeinfer_dask.protocol.messages import CancelRuns, RunDone
from tests.engine.pairs import LAYERS, PROMPT, Pair, PairOf

NEW_TOKENS = 100


@pytest.fixture(scope="module")
def wrong(pair_of: PairOf) -> Pair:
    return pair_of("llama", "always wrong")


@pytest.fixture(
    scope="module", params=["in-process", pytest.param("inproc", marks=pytest.mark.cluster)]
)
def engine(request: pytest.FixtureRequest, wrong: Pair) -> Iterator[pi.Engine]:
    """An engine whose every drafted run is cancelled."""
    client = request.getfixturevalue("inproc_client") if request.param == "inproc" else None
    with pi.Engine.from_pretrained(
        wrong.target, wrong.draft, stages=4, client=client, in_process=client is None
    ) as engine:
        yield engine


def layers_by_run(result: pi.Result) -> dict[int, int]:
    return {
        what.run: sum(span.layers for span in what.spans)
        for _, what in result.trace
        if isinstance(what, RunDone)
    }


def cancelled_runs(result: pi.Result) -> set[int]:
    return {run for _, what in result.trace if isinstance(what, CancelRuns) for run in what.runs}


def test_what_is_left_of_a_cancelled_run_is_not_computed(engine: pi.Engine) -> None:
    result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, strategy="pipeinfer")
    layers, cancelled = layers_by_run(result), cancelled_runs(result)
    assert all(layers[run] == LAYERS for run in layers.keys() - cancelled)
    assert any(layers[run] < LAYERS for run in cancelled)
    assert result.metrics.layers_computed == sum(layers.values())
    assert result.metrics.layers_wasted == sum(layers[run] for run in cancelled)


def test_without_cancellation_every_run_is_computed_to_its_end(
    engine: pi.Engine, wrong: Pair
) -> None:
    result = engine.generate(
        PROMPT, max_new_tokens=NEW_TOKENS, strategy="pipeinfer", cancellation=False
    )
    assert result.token_ids == wrong.greedy[:NEW_TOKENS]
    assert result.metrics.runs > NEW_TOKENS
    assert result.metrics.layers_computed == LAYERS * result.metrics.runs
    assert result.metrics.runs_cancelled == 0


def test_a_run_against_the_targets_choice_is_counted_as_invalid(engine: pi.Engine) -> None:
    metrics = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, strategy="pipeinfer").metrics
    assert metrics.runs_cancelled == metrics.runs_cancelled_invalid > 0
    assert metrics.runs_cancelled_superfluous == 0


def test_a_run_in_flight_when_the_text_ends_is_counted_as_superfluous(engine: pi.Engine) -> None:
    run = engine.start(PROMPT, max_new_tokens=480, strategy="iterative")
    next(iter(run))
    run.cancel()
    metrics = run.result().metrics
    assert metrics.runs_cancelled == metrics.runs_cancelled_superfluous == 1
    assert metrics.runs_cancelled_invalid == 0
    assert metrics.runs == metrics.generated_tokens + 1
