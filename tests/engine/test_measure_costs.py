"""What a live engine costs, as the simulator takes it."""

from __future__ import annotations

import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.engine import EngineClosedError
from pipeinfer_dask.runtime.head.head import PipelineBusyError
from tests.engine.pairs import PROMPT, Pair


def check(engine: pi.Engine, pair: Pair) -> None:
    costs = engine.measure_costs()
    assert len(costs.stages) == 2
    for curve in (*costs.stages, costs.draft):
        assert len(curve.seconds) == 8 and min(curve.seconds) > 0
    assert costs.hop_s > 0
    simulation = pi.simulate("adaptive", costs=costs, max_new_tokens=20)
    assert len(simulation.token_ids) == 20
    # What was measured with has left nothing behind.
    result = engine.generate(PROMPT, max_new_tokens=30)
    assert result.token_ids == pair.greedy[:30]


def test_a_measured_engine_can_be_simulated_and_goes_on(pair: Pair) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True) as engine:
        check(engine, pair)


@pytest.mark.cluster
def test_a_measured_engine_on_workers_goes_on_too(pair: Pair, tcp_client: Client) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, client=tcp_client) as engine:
        check(engine, pair)


def test_without_a_draft_model_a_pass_of_it_costs_nothing(pair: Pair) -> None:
    with pi.Engine.from_pretrained(pair.target, stages=1, in_process=True) as engine:
        costs = engine.measure_costs()
    assert set(costs.draft.seconds) == {0.0}


def test_a_busy_engine_is_not_measured(pair: Pair) -> None:
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=2, in_process=True) as engine:
        running = engine.start(PROMPT, max_new_tokens=480)
        with pytest.raises(PipelineBusyError, match="wait for what runs, or cancel it"):
            engine.measure_costs()
        running.cancel()
        running.result(30)


def test_a_closed_engine_is_not_measured(pair: Pair) -> None:
    engine = pi.Engine.from_pretrained(pair.target, stages=1, in_process=True)
    engine.close()
    with pytest.raises(EngineClosedError, match="open another one"):
        engine.measure_costs()
