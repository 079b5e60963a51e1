"""Several requests on one simulated pipeline: what they reach together, and how fairly."""

from __future__ import annotations

import pytest

from pipeinfer_dask.protocol.messages import PipelineEvent
from pipeinfer_dask.simulation import Costs, Simulation, simulate_together
from pipeinfer_dask.simulation.truth import SyntheticPair

TOKENS = 100
COSTS = Costs.even(4, stage_s=0.05, token_cost=0.05)


def together(
    strategy: str, requests: int, costs: Costs = COSTS, a: float = 0.79
) -> list[Simulation]:
    return simulate_together(
        strategy, requests, costs=costs, acceptance=a, max_new_tokens=TOKENS, prompt_tokens=1
    )


def speed(simulations: list[Simulation]) -> float:
    """Return the tokens a second of all until the last one ends; all began at once."""
    return TOKENS * len(simulations) / max(TOKENS / each(one) for one in simulations)


def each(simulation: Simulation) -> float:
    assert simulation.metrics.tokens_per_s is not None
    return simulation.metrics.tokens_per_s


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
def test_each_request_gets_the_text_of_its_seed(strategy: str) -> None:
    for seed, simulation in enumerate(together(strategy, 3)):
        text = SyntheticPair(0.79, seed).text(TOKENS + 1)
        assert tuple(simulation.token_ids) == text[1:]
        assert simulation.trace.metrics().generated_tokens == TOKENS


def test_four_requests_together_are_faster_than_one_alone() -> None:
    alone = speed(together("adaptive", 1))
    four, sixteen = together("adaptive", 4), together("adaptive", 16)
    assert speed(four) > 2 * alone
    assert speed(sixteen) > 2.5 * alone
    for several in (four, sixteen):
        assert max(map(each, several)) < 1.5 * min(map(each, several))


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("requests", [1, 2, 4, 8])
@pytest.mark.parametrize("a", [0.0, 0.6, 0.95])
def test_together_adaptive_is_never_much_slower_than_plain_decoding(
    stages: int, requests: int, a: float
) -> None:
    costs = Costs.even(stages, stage_s=0.05, token_cost=0.05)
    plain = speed(together("iterative", requests, costs, a))
    assert speed(together("adaptive", requests, costs, a)) > 0.85 * plain


def test_a_draft_model_that_is_too_slow_for_all_is_not_waited_for() -> None:
    costs = Costs.even(4, stage_s=0.05, token_cost=0.05, draft_cost=3.0)
    plain = speed(together("iterative", 8, costs))
    assert speed(together("adaptive", 8, costs)) > 0.8 * plain


def test_a_trace_is_of_its_own_request_alone() -> None:
    first, second = together("adaptive", 2)
    for simulation, number in ((first, 0), (second, 1)):
        said = [what for _, what in simulation.trace if not isinstance(what, PipelineEvent)]
        assert {what.request for what in said} == {number}


def test_a_number_of_requests_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="expected requests as a whole number"):
        simulate_together("adaptive", 0)
