"""Whatever the strategy, the draft, the stages and the driver: the text is the target's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import pipeinfer_dask as pi
from tests.engine.pairs import NEW_TOKENS, PROMPT, QUALITIES, Pair, PairOf

FAMILIES = ("llama", "qwen2", "qwen3")
STRATEGIES: dict[str, dict[str, Any]] = {
    "iterative": {"strategy": "iterative"},
    "speculative": {"strategy": "speculative"},
    "speculative, a tree": {"strategy": "speculative", "depth": 3},
    "pipeinfer": {"strategy": "pipeinfer"},
    "pipeinfer, a chain": {"strategy": "pipeinfer", "sequences": 1},
    "pipeinfer, a tree": {"strategy": "pipeinfer", "sequences": 3, "split": 0.05},
    "pipeinfer, synchronous": {"strategy": "pipeinfer", "asynchronous": False},
    "pipeinfer, not continuous": {"strategy": "pipeinfer", "continuous": False},
    "pipeinfer, nothing cancelled": {"strategy": "pipeinfer", "cancellation": False},
    "adaptive": {"strategy": "adaptive"},
    "adaptive, large runs": {"strategy": "adaptive", "micro_batch": 6, "ramp": 6},
}
# Every family with every quality, every family with every number of stages, and every
# quality with every number of stages.
SETUPS = [
    (FAMILIES[(index + stages) % 3], quality, stages)
    for index, quality in enumerate(QUALITIES)
    for stages in (1, 2, 3, 4)
]


@dataclass(frozen=True)
class Case:
    """Where an engine runs, and on what."""

    where: str
    family: str
    quality: str
    stages: int


def cases() -> Iterator[Any]:
    """Give every strategy with every setup in this process, and with each by one kind of workers.

    The two kinds take turns, like the colours of a chessboard: both have every strategy with every
    quality, and with every number of stages.
    """
    for where in ("in-process", "inproc", "tcp"):
        marks = () if where == "in-process" else (pytest.mark.cluster,)
        for number, (family, quality, stages) in enumerate(SETUPS):
            case = Case(where, family, quality, stages)
            for strategy, (name, asked) in enumerate(STRATEGIES.items()):
                turn = ("inproc", "tcp")[(number // 4 + stages + strategy) % 2]
                if where in ("in-process", turn):
                    label = f"{where}, {family}, {quality}, {stages} stages, {name}"
                    yield pytest.param(case, asked, id=label, marks=marks)


@pytest.fixture(scope="module")
def opened(
    request: pytest.FixtureRequest, pair_of: PairOf
) -> Iterator[tuple[pi.Engine, Pair, str]]:
    case: Case = request.param
    pair = pair_of(case.family, case.quality)
    driver: dict[str, Any] = {"in_process": True}
    if case.where != "in-process":
        driver = {"client": request.getfixturevalue(f"{case.where}_client")}
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=case.stages, **driver) as engine:
        yield engine, pair, case.quality


@pytest.mark.parametrize(("opened", "asked"), list(cases()), indirect=["opened"], scope="module")
def test_the_text_is_what_plain_decoding_gives(
    opened: tuple[pi.Engine, Pair, str], asked: dict[str, Any]
) -> None:
    engine, pair, quality = opened
    result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, **asked)
    assert result.token_ids == pair.greedy
    assert result.finish_reason == "length"
    metrics = result.metrics
    if quality == "always wrong":
        assert metrics.accepted_tokens == 0
    if quality == "always right":
        assert metrics.agreement_rate in (1, None)
    if waits_for_its_draft(asked):
        assert metrics.drafted_tokens > 0
        assert (metrics.accepted_tokens > 0) == (quality != "always wrong")


def waits_for_its_draft(asked: dict[str, Any]) -> bool:
    """Whether drafts take part however slow the draft model is."""
    return asked["strategy"] == "speculative" or asked.get("asynchronous") is False
