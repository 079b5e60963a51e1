from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from distributed import Client

from pipeinfer_dask.policies import STRATEGIES, Adaptive
from pipeinfer_dask.runtime.emulation.emulation import Emulation, default_processes
from pipeinfer_dask.runtime.emulation.lags import Distance
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from pipeinfer_dask.simulation import Costs, simulate

COSTS = Costs.even(2, stage_s=0.005, token_bytes=1024, layers=4)


@pytest.fixture(scope="module")
def near() -> Iterator[Emulation]:
    with Emulation.open(COSTS, acceptance=0.7, seed=3, in_process=True) as emulation:
        yield emulation


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_synthetic_text(near: Emulation, strategy: str) -> None:
    result = near.generate(strategy, max_new_tokens=12, timeout=30)
    assert result.token_ids == near.text(12)
    assert (
        result.token_ids == simulate(strategy, acceptance=0.7, seed=3, max_new_tokens=12).token_ids
    )
    assert result.metrics.generated_tokens == 12
    assert "Emulated" in repr(result) and "emulated" in repr(near)


def test_plain_decoding_does_as_many_runs_as_in_virtual_time(near: Emulation) -> None:
    real = near.generate("iterative", max_new_tokens=6, timeout=30).metrics
    virtual = simulate("iterative", costs=COSTS, acceptance=0.7, seed=3, max_new_tokens=6).metrics
    assert (real.runs, real.layers_computed) == (virtual.runs, virtual.layers_computed)


def test_a_policy_object_can_be_used_again(near: Emulation) -> None:
    policy = Adaptive(micro_batch=2)
    for _ in range(2):
        assert near.generate(policy, max_new_tokens=6, timeout=30).token_ids == near.text(6)


def test_costs_measured_on_emulated_nodes_are_those_that_are_emulated(near: Emulation) -> None:
    costs = near.measure_costs()
    assert len(costs.stages) == 2 and costs.layers == 4
    for stage in costs.stages:
        # A sleep never ends early.
        assert all(took >= COSTS.stages[0](n) for n, took in enumerate(stage.seconds, 1))
    assert all(took >= COSTS.draft(n) for n, took in enumerate(costs.draft.seconds, 1))


def test_an_emulated_distance_is_part_of_a_hop(near: Emulation) -> None:
    distance = Distance(0.01, 1e6)
    with Emulation.open(COSTS, seed=3, in_process=True, distance=distance) as far:
        assert far.generate("adaptive", max_new_tokens=6, timeout=30).token_ids == far.text(6)
        costs = far.calibrated(2)
    assert costs.hop_s >= 0.01
    assert costs.bandwidth == 1e6


def test_a_client_and_no_cluster_at_all_are_not_had_together() -> None:
    with pytest.raises(ValueError, match="leave one out"):
        Emulation.open(COSTS, client=object(), in_process=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("costs", "most", "told"),
    [
        (3, 1, "expected costs as made by Costs.even, got 3"),
        (COSTS, 0, "expected max_concurrent as a whole number of at least 1, got 0"),
    ],
)
def test_what_nobody_can_emulate_is_refused(costs: Any, most: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Emulation.open(costs, in_process=True, max_concurrent=most)


def test_there_are_two_processes_at_least_and_no_more_than_nodes() -> None:
    assert default_processes(1) == 2
    assert default_processes(300) >= 2


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with ExitStack() as resources:
        yield own_cluster(2, resources)


@pytest.mark.cluster
@pytest.mark.parametrize("distance", [None, Distance(0.002, 1e7)], ids=["near", "far"])
def test_many_nodes_share_few_worker_processes(client: Client, distance: Distance | None) -> None:
    costs = Costs.even(6, stage_s=0.005, token_bytes=1024)
    with Emulation.open(costs, client=client, distance=distance) as emulation:
        result = emulation.generate("adaptive", max_new_tokens=12, timeout=60)
        assert result.token_ids == emulation.text(12)
        assert len(result.metrics.stage_utilization) == 6
        if distance is not None:
            assert emulation.calibrated(2).hop_s >= distance.latency_s


def test_knobs_beside_a_policy_are_refused(near: Emulation) -> None:
    with pytest.raises(ValueError, match="expected knobs or a policy of your own, got both"):
        near.generate(Adaptive(), ramp=2)
