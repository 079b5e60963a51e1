"""All strategies on an emulated pipeline, and the simulator beside it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from pipeinfer_dask.runtime.emulation.emulation import Emulation
from pipeinfer_dask.simulation import CHAINS, Costs, simulate

MICRO_BATCHES = (1, 2, 3, 4)
CUTOFFS = (0.02, 0.1, 0.2, 0.3, 0.5)
"""Settings to choose from, for `pipeinfer`."""
PLAIN_TOKENS = 12
"""Most tokens of plain decoding: each takes as long as the one before."""
HOP_ROUNDS = 5
"""Of the hop that is measured before; the median counts."""
TIMEOUT_S = 600.0
"""Most seconds to wait for one text."""

Settings = Mapping[str, Mapping[str, Any]]


def best_settings(costs: Costs, acceptance: float, seed: int, tokens: int) -> Settings:
    """Return each strategy's settings: the best that the simulator finds for this very text."""

    def best(strategy: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return max(
            choices,
            key=lambda knobs: _simulated(costs, acceptance, seed, tokens, strategy, knobs),
        )

    return {
        "iterative": {},
        "speculative": best("speculative", [{"k": k} for k in CHAINS]),
        "pipeinfer": best(
            "pipeinfer",
            [
                {"micro_batch": size, "cutoff": cutoff, "sequences": 1}
                for size, cutoff in product(MICRO_BATCHES, CUTOFFS)
            ],
        ),
        "adaptive": {},
    }


def compare(emulation: Emulation, *, tokens: int, timeout: float) -> dict[str, Any]:
    """Generate by all strategies, emulated and simulated, with the hops that are measured here.

    Parameters
    ----------
    emulation : Emulation
    tokens : int
        To generate; by plain decoding at most 12.
    timeout : float
        Most seconds for each generation.

    Returns
    -------
    dict
        ``hop_ms``, tokens/s of each strategy, ``simulated`` tokens/s of each, ``deviation`` of
        each (measured by simulated, less 1), ``ratio_deviation`` (the most by which the ratio
        of two strategies deviates), ``settings``, ``tokens`` and ``emulated``.

    Raises
    ------
    RuntimeError
        If a strategy gave another text than the synthetic one.
    """
    acceptance, seed = emulation.acceptance, emulation.seed
    costs = emulation.calibrated(HOP_ROUNDS)
    settings = best_settings(costs, acceptance, seed, tokens)
    measured: dict[str, float] = {}
    simulated: dict[str, float] = {}
    for strategy, knobs in settings.items():
        count = min(PLAIN_TOKENS, tokens) if strategy == "iterative" else tokens
        # The shortest prompt: what is compared is decoding.
        result = emulation.generate(
            strategy, max_new_tokens=count, prompt_tokens=1, timeout=timeout, **knobs
        )
        if result.token_ids != emulation.text(count, 1):
            raise RuntimeError(
                f"{strategy} generated another text than the emulated target's: this is a bug in "
                f"pipeinfer_dask, please report it"
            )
        measured[strategy] = result.metrics.tokens_per_s or 0.0
        simulated[strategy] = _simulated(costs, acceptance, seed, count, strategy, knobs)
    ratios = {name: speed / simulated[name] for name, speed in measured.items()}
    return {
        "hop_ms": 1e3 * costs.hop_s,
        **measured,
        "simulated": simulated,
        "deviation": {name: ratio - 1 for name, ratio in ratios.items()},
        "ratio_deviation": max(ratios.values()) / min(ratios.values()) - 1,
        "settings": {name: dict(knobs) for name, knobs in settings.items()},
        "tokens": tokens,
        "emulated": True,
    }


def _simulated(
    costs: Costs, acceptance: float, seed: int, tokens: int, strategy: str, knobs: Mapping[str, Any]
) -> float:
    simulation = simulate(
        strategy,
        costs=costs,
        acceptance=acceptance,
        max_new_tokens=tokens,
        prompt_tokens=1,
        seed=seed,
        **knobs,
    )
    return simulation.metrics.tokens_per_s or 0.0
