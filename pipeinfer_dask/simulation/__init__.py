"""The same machine and policies in virtual time: what a pipeline would do, without one.

`simulate` runs one request with a cost model and a synthetic target and draft; seconds of
a large cluster take milliseconds here. Nothing of it is a second scheduler: see `world`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from inspect import signature
from typing import Any

from pipeinfer_dask.policies import Policy, policy_of
from pipeinfer_dask.protocol.messages import Origin
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.protocol.sampling import Sampling
from pipeinfer_dask.simulation.costs import Costs, Curve, NodeDescription, costs_of_nodes
from pipeinfer_dask.simulation.faults import losses_of, slowdowns_of
from pipeinfer_dask.simulation.truth import SyntheticPair
from pipeinfer_dask.simulation.world import World
from pipeinfer_dask.trace import Metrics, Trace
from pipeinfer_dask.trace.picture import result_html

__all__ = [
    "Costs",
    "Curve",
    "NodeDescription",
    "Simulation",
    "best_chain",
    "costs_of_nodes",
    "simulate",
    "simulate_together",
]

PROMPT_TOKENS = 16
MOST_TOKENS = 100_000
"""Of a prompt, and of what follows: beyond what any model's text is simulated for."""
SAMPLING = frozenset(("do_sample", *(field.name for field in fields(Sampling))))
"""What an engine's text is sampled by."""
SLOTS = 2048
"""Slots for speculation: enough for the widest tree in the longest pipeline."""


@dataclass(frozen=True)
class Simulation:
    """A generation in virtual time.

    Attributes
    ----------
    token_ids : list of int
        Synthetic: ranks among the draft model's choices.
    origins : list of Origin
        Where each token came from.
    finish_reason : {"length"}
    strategy : str
    costs : Costs
    trace : Trace
        As that of a real generation, in virtual seconds.
    """

    token_ids: list[int]
    origins: list[Origin]
    finish_reason: str
    strategy: str
    costs: Costs
    trace: Trace

    @cached_property
    def metrics(self) -> Metrics:
        """The figures, in virtual seconds."""
        return self.trace.metrics()

    def _repr_html_(self) -> str:
        return result_html(self.trace, f"{self.strategy}, {self.finish_reason} (simulated)")

    def __repr__(self) -> str:
        return (
            f"Simulation(strategy={self.strategy!r}, stages={len(self.costs.stages)}, "
            f"tokens={len(self.token_ids)}, tokens_per_s={self.metrics.tokens_per_s:.4g})"
        )


def simulate(
    strategy: str | Policy = "adaptive",
    *,
    stages: int | None = None,
    acceptance: float = 0.8,
    costs: Costs | None = None,
    max_new_tokens: int = 200,
    prompt_tokens: int = PROMPT_TOKENS,
    seed: int = 0,
    overconfidence: float = 0.0,
    clairvoyant: bool = False,
    losses: Sequence[tuple[float, int | None] | tuple[float, int | None, float]] = (),
    slowdowns: Sequence[tuple[float, int | None, float, float]] = (),
    **knobs: Any,
) -> Simulation:
    """Generate in virtual time.

    Parameters
    ----------
    strategy : str or Policy
        As for `Engine.generate`.
    stages : int, optional
        Equal stages of 50 ms; by default 8, unless ``costs`` says otherwise.
    acceptance : float
        Mean chance, from 0 to 1, that the draft model's first choice is the target's. At each
        place it is drawn anew, from a Beta distribution.
    costs : Costs, optional
        What everything costs; then ``stages`` is left out. See `Costs.even`,
        `costs_of_nodes` and `Engine.measure_costs`.
    max_new_tokens, prompt_tokens : int
        Tokens to generate, and tokens of the prompt.
    seed : int
        Of the text and of the draft model's guesses; the same for all strategies.
    overconfidence : float
        0: the draft model's confidences are its chances.
    clairvoyant : bool
        The draft model knows which of its choices is right: a bound, not a strategy.
    losses : sequence of (float, int or None) or (float, int or None, float)
        Nodes that are lost: when, in seconds, and which: a stage's number, or None for the
        drafter; and after how many seconds that is noticed, as it is late of one that hangs: by
        default after a hop. ``costs.rebuild_s`` later another one has taken over.
    slowdowns : sequence of (float, int or None, float, float)
        Nodes that are slow for a while: when, in seconds, and which, as for ``losses``; how many
        times longer their passes take, and for how many seconds.
    **knobs
        The strategy's own settings.

    Returns
    -------
    Simulation
        With the trace and the metrics that a real generation has.

    Raises
    ------
    ValueError
        If an argument is out of its range, or strategy and knobs are not to be had.
    RuntimeError
        If a policy of your own raises, or plans nothing while nothing is under way.
    """
    _check_counts(max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens)
    policy = _policy_of(strategy, knobs, simulate)
    costs = _checked(costs, stages)
    pair = SyntheticPair(acceptance, seed, overconfidence=overconfidence, clairvoyant=clairvoyant)
    prompt = pair.text(prompt_tokens)
    slots = prompt_tokens + max_new_tokens + SLOTS
    request = Request(0, prompt, max_new_tokens, slots, reads_ahead=True)
    world = World(
        request,
        policy,
        costs,
        pair,
        losses=losses_of(losses, len(costs.stages)),
        slowdowns=slowdowns_of(slowdowns, len(costs.stages)),
    )
    return _simulations(world, policy, costs)[0]


def simulate_together(
    strategy: str | Policy = "adaptive",
    requests: int = 4,
    *,
    stages: int | None = None,
    acceptance: float = 0.8,
    costs: Costs | None = None,
    max_new_tokens: int = 200,
    prompt_tokens: int = PROMPT_TOKENS,
    seed: int = 0,
    **knobs: Any,
) -> list[Simulation]:
    """Generate several texts on one pipeline in virtual time. All begin at once.

    Parameters
    ----------
    strategy : str or Policy
        As for `simulate`; each request gets its own policy.
    requests : int
        How many texts.
    stages : int, optional
        As for `simulate`.
    acceptance : float
        As for `simulate`.
    costs : Costs, optional
        As for `simulate`.
    max_new_tokens, prompt_tokens : int
        Of each text.
    seed : int
        Of the first text; the next one has the next seed.
    **knobs
        The strategy's own settings.

    Returns
    -------
    list of Simulation, [requests]
        Each with its own trace.

    Raises
    ------
    ValueError, RuntimeError
        As `simulate` does.
    """
    _check_counts(
        requests=requests,
        max_new_tokens=max_new_tokens,
        prompt_tokens=prompt_tokens,
    )
    policy, costs = _policy_of(strategy, knobs, simulate_together), _checked(costs, stages)
    pair = SyntheticPair(acceptance, seed)
    slots = prompt_tokens + max_new_tokens + SLOTS
    asked = [
        Request(
            number,
            pair.reseeded(seed + number).text(prompt_tokens),
            max_new_tokens,
            slots,
            reads_ahead=True,
            sampling=Sampling(seed=seed + number),
        )
        for number in range(requests)
    ]
    others = [(request, policy.fresh()) for request in asked[1:]]
    return _simulations(World(asked[0], policy, costs, pair, others=others), policy, costs)


def _policy_of(
    strategy: str | Policy, knobs: Mapping[str, Any], call: Callable[..., object]
) -> Policy:
    """Return the policy, or say which argument of the call a knob that there is not may be."""
    try:
        return policy_of(strategy, knobs)
    except ValueError:
        for name in knobs:
            if name in SAMPLING:
                raise ValueError(
                    f"expected no {name} for a simulation, whose text is synthetic and takes no "
                    "sampling: leave it out"
                ) from None
            if near := get_close_matches(name, signature(call).parameters, n=1, cutoff=0.8):
                raise ValueError(
                    f"there is no setting {name!r}: did you mean {near[0]!r}?"
                ) from None
        raise


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"expected {name} as a whole number of at least 1, got {count!r}")
        if count > MOST_TOKENS:
            raise ValueError(f"expected {name} up to {MOST_TOKENS}, got {count}: ask for fewer")


def _checked(costs: Costs | None, stages: int | None) -> Costs:
    if costs is None:
        return Costs.even(8 if stages is None else stages)
    if not isinstance(costs, Costs):
        raise ValueError(f"expected costs as made by Costs.even, got {costs!r}")
    if stages is not None:
        raise ValueError(
            f"expected stages or costs, got stages={stages!r} and costs of {len(costs.stages)}: "
            "leave one out"
        )
    return costs


def _simulations(world: World, policy: Policy, costs: Costs) -> list[Simulation]:
    world.run()
    finished = []
    for outcome in world.outcomes:
        assert outcome.finished is not None
        tokens, origins = outcome.tokens, outcome.origins
        finished.append(
            Simulation(tokens, origins, outcome.finished, policy.name, costs, outcome.trace)
        )
    return finished


CHAINS = (1, 2, 4, 6, 8, 12)
"""Lengths of a chain that standard speculation is tuned over."""


def best_chain(**world: Any) -> int:
    """Return the k of `CHAINS` with which ``speculative`` is fastest.

    Parameters
    ----------
    **world
        As for `simulate`.

    Returns
    -------
    int
        Drafted tokens in each run.
    """

    def speed(k: int) -> float:
        return simulate("speculative", k=k, **world).metrics.tokens_per_s or 0.0

    return max(CHAINS, key=speed)
