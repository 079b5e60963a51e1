"""Virtual time, worked out by hand where it can be, and the strategies in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any, ClassVar, Self

import pytest

import pipeinfer_dask as pi
from pipeinfer_dask.policies import Adaptive, Iterative, Machine, Node, Policy
from pipeinfer_dask.protocol.messages import (
    CancelRuns,
    Commit,
    Drafted,
    DrafterLost,
    RunDone,
    StageLost,
    StartRun,
)
from pipeinfer_dask.simulation import CHAINS, Costs, best_chain, simulate, simulate_together
from pipeinfer_dask.simulation.truth import SyntheticPair

STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("iterative", {}),
    ("speculative", {}),
    ("speculative", {"k": 8, "depth": 3}),
    ("pipeinfer", {}),
    ("pipeinfer", {"sequences": 1, "micro_batch": 2}),
    ("pipeinfer", {"asynchronous": False}),
    ("pipeinfer", {"continuous": False}),
    ("pipeinfer", {"cancellation": False}),
    ("adaptive", {}),
    ("adaptive", {"tree": False}),
    ("adaptive", {"pruning": False}),
    ("adaptive", {"cancellation": False}),
    ("adaptive", {"calibrate": False, "micro_batch": 12}),
]


def test_plain_decoding_takes_the_time_of_all_stages_and_hops_for_each_token() -> None:
    costs = Costs.even(4, stage_s=1.0, token_cost=0.1, hop_cost=0.05)
    metrics = simulate("iterative", costs=costs, prompt_tokens=1, max_new_tokens=50).metrics
    token = 4 * 1.0 + 5 * 0.05
    assert metrics.ttft_s == pytest.approx(token)
    assert metrics.itl_s == pytest.approx(token)
    assert metrics.itl_p95_s == pytest.approx(token)
    assert metrics.stage_utilization == pytest.approx([1 / token] * 4)


def test_standard_speculation_takes_the_draft_and_one_run_of_all_its_tokens() -> None:
    costs = Costs.even(
        2, stage_s=1.0, token_cost=0.1, draft_cost=0.2, draft_token_cost=0.0, hop_cost=0.05
    )
    metrics = simulate(
        "speculative", k=3, acceptance=1.0, costs=costs, prompt_tokens=1, max_new_tokens=401
    ).metrics
    # there and back to the drafter, three passes, then four tokens through both stages
    round_s = 2 * 0.05 + 3 * 0.2 + 2 * 1.3 + 3 * 0.05
    assert metrics.itl_s == pytest.approx(round_s / 4, rel=1e-2)


def test_unequal_stages_go_at_the_pace_of_the_slowest() -> None:
    fast, slow = Costs.even(1, stage_s=1.0).stages[0], Costs.even(1, stage_s=3.0).stages[0]
    costs = Costs((fast, slow, fast), Costs.even(1, draft_cost=0.01).draft, 0.0)
    metrics = simulate(
        "pipeinfer",
        costs=costs,
        acceptance=1.0,
        micro_batch=1,
        sequences=1,
        cutoff=0.0,
        recovery=0.0,
        max_new_tokens=400,
    ).metrics
    assert metrics.itl_s == pytest.approx(3.0, rel=0.05)
    assert metrics.stage_utilization[1] > 0.95


def test_a_narrow_link_holds_the_tokens_of_a_long_prompt_back() -> None:
    wide = simulate("iterative", stages=3, prompt_tokens=100, max_new_tokens=2).metrics
    costs = Costs.even(3, bandwidth=1e6, token_bytes=16384)
    narrow = simulate("iterative", costs=costs, prompt_tokens=100, max_new_tokens=2).metrics
    assert wide.ttft_s is not None
    assert narrow.ttft_s == pytest.approx(wide.ttft_s + 2 * 100 * 0.016384)


def test_a_cancelled_run_stops_at_its_next_layer_or_costs_nothing_where_it_has_not_begun() -> None:
    result = simulate("pipeinfer", acceptance=0.4, costs=Costs.even(6, stage_s=1.0, layers=4))
    cancelled: dict[int, float] = {}
    for time, what in result.trace:
        if isinstance(what, CancelRuns):
            cancelled.update(dict.fromkeys(what.runs, time))
    cut = skipped = 0
    for _, what in result.trace:
        if not isinstance(what, RunDone) or what.run not in cancelled:
            continue
        for span in what.spans:
            heard = cancelled[what.run] + result.costs.hop_s
            if span.began > heard:
                assert span.layers == 0
                assert span.ended == span.began
                skipped += 1
            elif span.ended > heard:
                layer_s = 1.15 / 4 if span.layers < 4 else 1.15
                assert span.ended - heard <= layer_s + 1e-9
                cut += span.layers < 4
    assert cut > 10
    assert skipped > 10


def test_a_stage_computes_one_run_at_a_time_in_order() -> None:
    result = simulate("adaptive", stages=5, acceptance=0.7)
    for stage in range(5):
        spans = [what.spans[stage] for _, what in result.trace if isinstance(what, RunDone)]
        for before, after in pairwise(spans):
            assert before.ended <= after.began + 1e-9


@pytest.mark.parametrize(("strategy", "knobs"), STRATEGIES)
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.79, 1.0])
@pytest.mark.parametrize("stages", [1, 3, 8])
def test_every_strategy_gives_the_targets_own_text(
    strategy: str, knobs: dict[str, Any], acceptance: float, stages: int
) -> None:
    result = simulate(
        strategy, stages=stages, acceptance=acceptance, max_new_tokens=80, seed=7, **knobs
    )
    text = SyntheticPair(acceptance, 7).text(96)
    assert result.token_ids == list(text[16:])
    assert result.finish_reason == "length"
    assert len(result.origins) == 80
    assert result.trace.stages == stages


@pytest.mark.parametrize("strategy", ["speculative", "pipeinfer", "adaptive"])
def test_the_same_arguments_give_the_same_trace(strategy: str) -> None:
    one, other = (simulate(strategy, acceptance=0.6, seed=2) for _ in range(2))
    assert one.trace.records == other.trace.records


@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("token_cost", [0.05, 0.3])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_adaptive_is_never_slower_than_plain_decoding(
    acceptance: float, token_cost: float, stages: int
) -> None:
    world: dict[str, Any] = {
        "acceptance": acceptance,
        "costs": Costs.even(stages, token_cost=token_cost),
        "max_new_tokens": 400,
    }
    plain = simulate("iterative", **world).metrics.tokens_per_s
    ours = simulate("adaptive", **world).metrics.tokens_per_s
    assert plain is not None and ours is not None
    assert ours >= 0.97 * plain


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
@pytest.mark.parametrize("token_cost", [0.05, 0.3])
def test_a_draft_that_is_never_right_costs_next_to_nothing(stages: int, token_cost: float) -> None:
    world: dict[str, Any] = {
        "acceptance": 0.0,
        "costs": Costs.even(stages, token_cost=token_cost),
        "max_new_tokens": 300,
    }
    plain = simulate("iterative", **world).metrics.tokens_per_s or 0
    ours = simulate("adaptive", tree=False, **world)
    assert ours.metrics.accepted_tokens == 0
    assert (ours.metrics.tokens_per_s or 0) >= 0.97 * plain


@pytest.mark.parametrize("stages", [4, 8])
@pytest.mark.parametrize("token_cost", [0.05, 0.3])
def test_adaptive_keeps_up_where_the_draft_is_nearly_always_right(
    stages: int, token_cost: float
) -> None:
    world: dict[str, Any] = {
        "acceptance": 0.95,
        "costs": Costs.even(stages, token_cost=token_cost),
        "max_new_tokens": 500,
    }

    def speed(strategy: str, **knobs: Any) -> float:
        runs = [simulate(strategy, seed=seed, **world, **knobs) for seed in range(3)]
        return sum(run.metrics.tokens_per_s or 0 for run in runs)

    others = [
        *(speed("speculative", k=k) for k in (8, 12)),
        *(speed("pipeinfer", sequences=1, micro_batch=size) for size in (1, 2, 3, 4)),
    ]
    assert speed("adaptive") >= 0.97 * max(others)


@pytest.mark.parametrize("relative", [0.1, 0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("strategy", ["pipeinfer", "adaptive"])
def test_a_slow_link_is_not_flooded_with_speculation(strategy: str, relative: float) -> None:
    costs = Costs.even(4, bandwidth=1.0, token_bytes=1)
    costs = replace(costs, bandwidth=1 / (0.05 * relative))
    plain = simulate("iterative", costs=costs, max_new_tokens=400).metrics.tokens_per_s or 0
    ours = simulate(strategy, costs=costs, max_new_tokens=400).metrics.tokens_per_s or 0
    assert ours >= (0.85 if strategy == "adaptive" else 0.4) * plain


@pytest.mark.parametrize("stages", [4, 8, 16])
@pytest.mark.parametrize("acceptance", [0.52, 0.66, 0.79])
def test_the_strategies_come_in_the_order_that_they_promise(stages: int, acceptance: float) -> None:
    world: dict[str, Any] = {"acceptance": acceptance, "costs": Costs.even(stages)}
    chain: dict[str, Any] = {"sequences": 1}
    speeds = [
        simulate("iterative", **world).metrics.tokens_per_s or 0,
        simulate("speculative", k=best_chain(**world), **world).metrics.tokens_per_s or 0,
        simulate("pipeinfer", **world, **chain).metrics.tokens_per_s or 0,
        simulate("adaptive", **world).metrics.tokens_per_s or 0,
    ]
    assert speeds == sorted(speeds)


def test_the_first_token_is_no_later_than_with_plain_decoding() -> None:
    plain, ours = (simulate(s, prompt_tokens=200).metrics for s in ("iterative", "adaptive"))
    assert ours.ttft_s == plain.ttft_s


def test_a_clairvoyant_chooser_is_a_bound() -> None:
    ours = simulate("adaptive", acceptance=0.6).metrics.tokens_per_s or 0
    bound = simulate("adaptive", acceptance=0.6, clairvoyant=True).metrics.tokens_per_s or 0
    assert bound > 1.5 * ours


def test_calibration_pays_where_the_draft_model_boasts() -> None:
    def speed(**knobs: Any) -> float:
        runs = [
            simulate("adaptive", acceptance=0.66, overconfidence=2.0, seed=seed, **knobs)
            for seed in range(3)
        ]
        return sum(run.metrics.tokens_per_s or 0 for run in runs)

    assert speed() > 1.04 * speed(calibrate=False)


def test_pruning_leaves_out_tokens_and_saves_time() -> None:
    ours = simulate("adaptive", acceptance=0.66)
    left_out = sum(
        what.tokens.count(-1)
        for _, what in ours.trace
        if isinstance(what, RunDone) and what.tokens is not None
    )
    assert left_out > 20
    whole = simulate("adaptive", acceptance=0.66, pruning=False)
    assert (ours.metrics.tokens_per_s or 0) > (whole.metrics.tokens_per_s or 0)


@pytest.mark.parametrize(("strategy", "knobs"), STRATEGIES)
def test_losses_cost_time_and_nothing_of_the_text(strategy: str, knobs: dict[str, Any]) -> None:
    losses: list[tuple[float, int | None]] = [
        *((0.1, 1), (1.3, None), (2.0, 2), (2.05, 0), (2.4, None), (2.9, 2), (6.0, 1)),
    ]
    result = simulate(
        strategy, stages=3, acceptance=0.79, max_new_tokens=80, seed=7, losses=losses, **knobs
    )
    assert result.token_ids == list(SyntheticPair(0.79, 7).text(96)[16:])
    whole = simulate(strategy, stages=3, acceptance=0.79, max_new_tokens=80, seed=7, **knobs)
    times = [time for time, what in result.trace if isinstance(what, Commit)]
    assert times[-1] > [time for time, what in whole.trace if isinstance(what, Commit)][-1] + 2.0
    assert (
        result.metrics.losses
        == sum(isinstance(w, StageLost | DrafterLost) for _, w in result.trace)
        >= 5
    )
    assert result.metrics.generated_tokens == 80


def test_a_lost_stage_takes_a_hop_to_be_noticed_and_then_the_time_to_rebuild_it() -> None:
    costs = Costs.even(2, stage_s=1.0, hop_cost=0.25, rebuild_s=10.0)
    result = simulate(
        "iterative", costs=costs, prompt_tokens=1, max_new_tokens=3, losses=[(4.0, 1)]
    )
    commits = [time for time, what in result.trace if isinstance(what, Commit)]
    # a token takes 2.75 s; the second one is lost on its way, and both are read anew
    back = 4.0 + 0.25 + 10.0
    read = 2 * 1.05 + 0.75
    assert commits == pytest.approx([2.75, back + read, back + read + 2.75])


@pytest.mark.parametrize("noticed_s", [0.0, 0.25, 5.0])
def test_a_loss_that_is_noticed_late_shows_when_it_is_and_costs_so_much_more(
    noticed_s: float,
) -> None:
    costs = Costs.even(2, stage_s=1.0, hop_cost=0.25, rebuild_s=10.0)
    result = simulate(
        "iterative", costs=costs, prompt_tokens=1, max_new_tokens=3, losses=[(4.0, 1, noticed_s)]
    )
    told = [time for time, what in result.trace if isinstance(what, StageLost)]
    assert told == pytest.approx([4.0 + noticed_s])
    commits = [time for time, what in result.trace if isinstance(what, Commit)]
    back, read = 4.0 + noticed_s + 10.0, 2 * 1.05 + 0.75
    assert commits == pytest.approx([2.75, back + read, back + read + 2.75])


def test_a_loss_that_nobody_has_noticed_before_all_are_replaced_is_never_told() -> None:
    costs = Costs.even(3, stage_s=1.0, rebuild_s=2.0)
    losses = [(4.0, 1, 9.0), (5.0, 2, 0.5)]
    result = simulate("adaptive", costs=costs, max_new_tokens=30, losses=losses)
    told = [(time, what.reason) for time, what in result.trace if isinstance(what, StageLost)]
    assert told == [(5.5, "stage 2")]


def test_a_slow_stage_shows_in_its_spans_and_in_those_of_no_other() -> None:
    costs = Costs.even(3, stage_s=1.0, token_cost=0.0)
    slowdowns = [(10.0, 1, 4.0, 20.0), (15.0, None, 2.0, 5.0)]
    result = simulate("iterative", costs=costs, max_new_tokens=30, slowdowns=slowdowns)
    took: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for _, what in result.trace:
        if isinstance(what, RunDone):
            for stage, span in enumerate(what.spans):
                slow = stage == 1 and 10.0 <= span.began < 30.0
                took[stage].add(round(span.ended - span.began))
                assert span.ended - span.began == pytest.approx(4.0 if slow else 1.0)
    assert took == {0: {1}, 1: {1, 4}, 2: {1}}


def test_a_slow_drafter_takes_as_many_times_longer() -> None:
    costs = Costs.even(2, draft_cost=0.5, draft_token_cost=0.0)
    result = simulate(
        "speculative", k=2, costs=costs, max_new_tokens=20, slowdowns=[(0.0, None, 3.0, 1e6)]
    )
    plain = simulate("speculative", k=2, costs=costs, max_new_tokens=20)
    assert result.token_ids == plain.token_ids

    def spans(of: pi.Simulation) -> list[float]:
        drafts = (what.span for _, what in of.trace if isinstance(what, Drafted))
        return [span.ended - span.began for span in drafts if span is not None]

    assert spans(result) == pytest.approx([3 * took for took in spans(plain)])


@pytest.mark.parametrize(("strategy", "knobs"), STRATEGIES)
@pytest.mark.parametrize("seed", range(4))
def test_faults_of_all_kinds_by_chance_cost_nothing_of_the_text(
    strategy: str, knobs: dict[str, Any], seed: int
) -> None:
    random = Random(seed)
    nodes = (None, 0, 1, 2)
    losses = [(0.5, 1, 1.0)] + [
        (random.uniform(0, 8), random.choice(nodes), random.choice((0.0, 0.1, 3.0)))
        for _ in range(5)
    ]
    slowdowns = [
        (random.uniform(0, 8), random.choice(nodes), random.choice((0.5, 3.0, 50.0)), 2.0)
        for _ in range(6)
    ]
    faults: dict[str, Any] = {"losses": losses, "slowdowns": slowdowns}
    world: dict[str, Any] = {"stages": 3, "acceptance": 0.79, "max_new_tokens": 80, "seed": 7}
    result = simulate(strategy, **world, **faults, **knobs)
    assert result.token_ids == list(SyntheticPair(0.79, 7).text(96)[16:])
    lost = sum(isinstance(what, StageLost | DrafterLost) for _, what in result.trace)
    assert result.metrics.losses == lost > 0


def test_the_loss_of_a_drafter_never_stops_the_text() -> None:
    costs = Costs.even(4, rebuild_s=100.0)
    result = simulate("speculative", costs=costs, max_new_tokens=50, losses=[(1.0, None)])
    plain = simulate("iterative", costs=costs, max_new_tokens=50)
    assert result.trace.records[-1][0] <= plain.trace.records[-1][0] + 1.0


def test_a_trace_holds_what_a_real_one_holds() -> None:
    trace = simulate("adaptive", max_new_tokens=20).trace
    kinds = {type(what) for _, what in trace}
    assert {StartRun, RunDone, Commit, CancelRuns} <= kinds
    times = [time for time, _ in trace]
    assert times == sorted(times)


def test_the_best_chain_is_one_that_was_tried() -> None:
    assert best_chain(acceptance=0.95, stages=4) in CHAINS
    assert best_chain(acceptance=0.1, stages=4) == 1


def test_a_policy_of_ones_own_is_taken_as_it_is() -> None:
    policy = Adaptive(micro_batch=3)
    result = pi.simulate(policy, max_new_tokens=10)
    assert result.strategy == "adaptive"
    assert max(len(w.batch) for _, w in result.trace if isinstance(w, StartRun)) == 16  # the prompt
    assert repr(result).startswith("Simulation(strategy='adaptive', stages=8, tokens=10,")


class Idle(Iterative):
    """Has nothing to do, once there is some text."""

    name: ClassVar[str] = "idle"

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        return super().choose_run(machine) if machine.generated < 5 else []


class Late(Idle):
    """Then it asks for some time, once for each token."""

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        due = self.wake_at(machine) is None
        return Iterative.choose_run(self, machine) if due else []

    def wake_at(self, machine: Machine) -> float | None:
        at = (machine.generated + 1) * 10.0
        return at if machine.now < at else None


class Overdue(Idle):
    """Then it asks to be woken at a time that comes once."""

    def wake_at(self, machine: Machine) -> float | None:
        return 1000.0


class Repeating(Iterative):
    """Has the same to do again and again."""

    name: ClassVar[str] = "repeating"

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        return [machine.root]


@dataclass
class Nameless(Policy):
    """A policy whose author forgot its name."""

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        return [machine.root] if machine.root_waits else []


class Bare(Policy):
    """A policy whose author forgot the decorator."""

    name: ClassVar[str] = "bare"

    def choose_run(self, machine: Machine) -> Sequence[Node]:
        return [machine.root] if machine.root_waits else []


class Copied(Bare):
    """One that says itself how it is copied."""

    def fresh(self) -> Self:
        return type(self)()


def test_a_policy_that_nobody_knows_how_to_copy_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="a dataclass, got Bare: put @dataclass before its class"):
        simulate(Bare())
    assert len(simulate(Copied(), max_new_tokens=5).token_ids) == 5


def test_a_policy_without_a_name_is_refused_with_how_to_give_it_one() -> None:
    with pytest.raises(ValueError, match="with a name, got Nameless with None: put name: ClassVar"):
        simulate(Nameless())


def test_a_policy_that_runs_a_token_again_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"'repeating': expected choose_run .* in no run yet"):
        simulate(Repeating())


def test_a_policy_that_waits_for_nothing_is_told_so() -> None:
    told = "policy 'idle' planned nothing while nothing is under way: .* is still to come$"
    with pytest.raises(RuntimeError, match=told):
        simulate(Idle())
    with pytest.raises(RuntimeError, match=told):
        simulate_together(Idle(), 3)
    told = "policy 'idle' planned nothing .* still to come, got 1000, which has passed"
    with pytest.raises(RuntimeError, match=told):
        simulate(Overdue())
    with pytest.raises(RuntimeError, match=told):
        simulate_together(Overdue(), 3)
    assert len(simulate(Late(), max_new_tokens=8).token_ids) == 8
    together = simulate_together(Late(), 3, max_new_tokens=8)
    assert [len(one.token_ids) for one in together] == [8] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 0}, "expected stages as a whole number from 1 to 1024, got 0"),
        ({"stages": 10**14}, "expected stages as a whole number from 1 to 1024, got 1000"),
        (
            {"stages": 5, "costs": pi.Costs.even(4)},
            "expected stages or costs, got stages=5 and costs of 4: leave one out",
        ),
        ({"max_new_tokens": 10**9}, "expected max_new_tokens up to 100000, got 1000000000: ask"),
        ({"seed": "lucky"}, "expected a seed as a whole number, got 'lucky'"),
        ({"max_new_tokens": 0}, "expected max_new_tokens as a whole number of at least 1"),
        ({"prompt_tokens": 1.5}, "expected prompt_tokens as a whole number"),
        ({"acceptance": -0.1}, "expected an acceptance from 0 to 1"),
        (
            {"losses": [(1.0, 8)]},
            "losses as .seconds, stage below 8 or None., got .1.0, 8.",
        ),
        ({"losses": [(-1.0, 1)]}, "expected losses as"),
        ({"losses": [(1.0, 1, -1.0)]}, "expected losses as"),
        ({"losses": [(1.0, 1, 1.0, 1.0)]}, "expected losses as"),
        ({"losses": [5]}, "expected losses as"),
        ({"slowdowns": [(1.0, 1, 0.0, 1.0)]}, "expected slowdowns as .*factor above 0"),
        ({"slowdowns": [(1.0, 8, 2.0, 1.0)]}, "expected slowdowns as .*stage below 8"),
        ({"slowdowns": [(1.0, 1)]}, "expected slowdowns as"),
        ({"strategy": "fast"}, "unknown strategy 'fast'"),
        ({"k": 3}, "'adaptive' has no knob 'k'"),
        ({"temperature": 0.5}, "expected no temperature for a simulation, whose text is synthetic"),
        ({"do_sample": True, "top_k": 5}, "expected no do_sample for a simulation"),
        ({"stage": 3}, "there is no setting 'stage': did you mean 'stages'"),
        ({"strategy": Adaptive(), "ramp": 2}, "expected knobs or a policy of your own, got both"),
    ],
)
def test_what_can_not_be_simulated_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)
