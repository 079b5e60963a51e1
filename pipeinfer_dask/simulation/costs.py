"""What a pipeline's parts cost in time: the cost model of the simulator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Self

MOST_STAGES = 1024
"""A longer pipeline is not simulated: no model has so many layers."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds that a pass takes, by the number of its tokens.

    Attributes
    ----------
    seconds : tuple of float
        For 1, 2, ... tokens. Beyond the last one each token costs as much more as the last
        one did.
    """

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds or not all(0 <= s < math.inf for s in self.seconds):
            raise ValueError(
                f"expected the seconds of a pass of 1, 2, ... tokens, each at least 0 and finite, "
                f"got {self.seconds!r}"
            )

    @classmethod
    def line(cls, first: float, share: float = 0.0) -> Self:
        """Return a curve where each token beyond the first adds the same.

        Parameters
        ----------
        first : float
            Seconds of a pass of one token.
        share : float
            What each further token adds, as a share of that.
        """
        return cls((first, first * (1 + share)))

    @classmethod
    def roofline(cls, read_s: float, token_s: float) -> Self:
        """Return the larger of two times: reading the weights, and computing each token.

        Parameters
        ----------
        read_s : float
            Seconds to read all weights once.
        token_s : float
            Seconds of arithmetic for each token.
        """
        # Up to the knee reading hides the arithmetic; behind it the line goes through zero.
        knee = 1 if token_s == 0 else min(4096, max(1, math.ceil(read_s / token_s)))
        return cls(tuple(max(read_s, n * token_s) for n in range(1, knee + 3)))

    def __call__(self, tokens: int) -> float:
        """Return the seconds of a pass of ``tokens`` tokens.

        Raises
        ------
        ValueError
            If there is none.
        """
        if tokens < 1:
            raise ValueError(f"expected a pass of at least 1 token, got {tokens}")
        known = len(self.seconds)
        if tokens <= known:
            return self.seconds[tokens - 1]
        slope = self.seconds[-1] - self.seconds[-2] if known > 1 else 0.0
        return self.seconds[-1] + (tokens - known) * max(0.0, slope)


@dataclass(frozen=True, slots=True)
class Costs:
    """What one pipeline costs.

    Attributes
    ----------
    stages : tuple of Curve, [stages]
        A run's time on each stage.
    draft : Curve
        A pass of the draft model.
    hop_s : float
        Seconds from one node to the next, whatever the size.
    bandwidth : float
        Bytes a second over each hop.
    token_bytes : int
        Bytes of one token's hidden states, which each hop carries.
    layers : int
        Decoder layers of each stage: a cancelled run stops at the next one.
    rebuild_s : float
        Seconds until a lost node stands again.
    """

    stages: tuple[Curve, ...]
    draft: Curve
    hop_s: float = 0.0
    bandwidth: float = math.inf
    token_bytes: int = 0
    layers: int = 8
    rebuild_s: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.stages) <= MOST_STAGES:
            raise ValueError(f"expected 1 to {MOST_STAGES} stages, got {len(self.stages)}")
        if not 0 <= self.hop_s < math.inf:
            raise ValueError(f"expected hop_s of at least 0 seconds, got {self.hop_s!r}")
        if not 0 <= self.rebuild_s < math.inf:
            raise ValueError(f"expected rebuild_s of at least 0 seconds, got {self.rebuild_s!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"expected a bandwidth above 0 bytes a second, got {self.bandwidth!r}")
        if not all(isinstance(curve, Curve) for curve in (*self.stages, self.draft)):
            raise ValueError(
                f"expected a Curve for each stage and for the draft model, got {self.stages!r} and "
                f"{self.draft!r}: see Costs.even"
            )
        if not 0 <= self.token_bytes < math.inf or self.layers < 1:
            raise ValueError(
                f"expected token_bytes of at least 0 and at least 1 layer, got "
                f"{self.token_bytes!r} and {self.layers!r}"
            )

    @classmethod
    def even(
        cls,
        stages: int,
        *,
        stage_s: float = 0.05,
        token_cost: float = 0.05,
        draft_cost: float = 0.15,
        draft_token_cost: float = 0.05,
        hop_cost: float = 0.02,
        bandwidth: float = math.inf,
        token_bytes: int = 0,
        layers: int = 8,
        rebuild_s: float = 1.0,
    ) -> Self:
        """Return the costs of ``stages`` equal stages, relative to the time of one.

        Parameters
        ----------
        stages : int
            How many, from 1 to 1024.
        stage_s : float
            Seconds of a one-token run on one stage.
        token_cost : float
            What each further token of a run adds, as a share of ``stage_s``.
        draft_cost : float
            A one-token pass of the draft model, as a share of ``stage_s``.
        draft_token_cost : float
            What each further token of a pass adds, as a share of that.
        hop_cost : float
            The latency of a hop, as a share of ``stage_s``.
        bandwidth : float
            As the attribute.
        token_bytes, layers : int
            As the attributes.
        rebuild_s : float
            As the attribute.
        """
        shares = {
            "token_cost": token_cost,
            "draft_cost": draft_cost,
            "draft_token_cost": draft_token_cost,
            "hop_cost": hop_cost,
        }
        count: object = stages
        whole = isinstance(count, int) and not isinstance(count, bool)
        if not whole or not 1 <= stages <= MOST_STAGES:
            raise ValueError(
                f"expected stages as a whole number from 1 to {MOST_STAGES}, got {stages!r}"
            )
        if not _is_number(stage_s) or not 0 < stage_s < math.inf:
            raise ValueError(f"expected stage_s above 0 seconds, got {stage_s!r}")
        for name, share in shares.items():
            if not _is_number(share) or not 0 <= share < math.inf:
                raise ValueError(f"expected {name} as a share of at least 0, got {share!r}")
        return cls(
            (Curve.line(stage_s, token_cost),) * stages,
            Curve.line(draft_cost * stage_s, draft_token_cost),
            hop_cost * stage_s,
            bandwidth,
            token_bytes,
            layers,
            rebuild_s,
        )

    def hop(self, tokens: int) -> float:
        """Return for how long a run occupies a link.

        Parameters
        ----------
        tokens : int
            Of the run.

        Returns
        -------
        float, seconds
            Beyond the latency, `hop_s`.
        """
        return tokens * self.token_bytes / self.bandwidth


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """A machine, as a data sheet gives it.

    Attributes
    ----------
    memory_bandwidth : float
        Bytes a second.
    flops : float
        Operations a second.
    """

    memory_bandwidth: float
    flops: float

    def __post_init__(self) -> None:
        if not (0 < self.memory_bandwidth < math.inf and 0 < self.flops < math.inf):
            raise ValueError(
                f"expected memory_bandwidth and flops above 0, got {self.memory_bandwidth!r} and "
                f"{self.flops!r}"
            )


def costs_of_nodes(
    nodes: Sequence[NodeDescription],
    *,
    weight_bytes: float,
    draft_node: NodeDescription,
    draft_weight_bytes: float,
    bytes_per_weight: float = 2.0,
    hop_s: float = 0.0,
    bandwidth: float = math.inf,
    token_bytes: int = 0,
    layers: int = 8,
) -> Costs:
    """Return what an even split of a model would cost on real nodes.

    A pass takes the larger of two times: reading the weights once, and two operations for
    each weight and token.

    Parameters
    ----------
    nodes : sequence of NodeDescription, [stages]
        The machine of each stage.
    weight_bytes : float
        Bytes of the whole target; each stage holds an equal share.
    draft_node : NodeDescription
        The drafter's machine.
    draft_weight_bytes : float
        Bytes of the draft model.
    bytes_per_weight : float
        2 for 16 bits.
    hop_s, bandwidth : float
        As those of `Costs`.
    token_bytes, layers : int
        As those of `Costs`.

    Returns
    -------
    Costs
        For `simulate`.
    """

    def curve(node: NodeDescription, size: float) -> Curve:
        return Curve.roofline(
            size / node.memory_bandwidth, 2 * size / bytes_per_weight / node.flops
        )

    return Costs(
        tuple(curve(node, weight_bytes / len(nodes)) for node in nodes),
        curve(draft_node, draft_weight_bytes),
        hop_s,
        bandwidth,
        token_bytes,
        layers,
    )
