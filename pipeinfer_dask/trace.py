"""What happened in one generation, and the figures that follow from it.

A trace is the machine's own record: each event that it was told and each command
that it gave, with the time. All figures are folds over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from pipeinfer_dask.core.messages import (
    Begin,
    CancelReason,
    CancelRuns,
    Command,
    Commit,
    Drafted,
    Event,
    Kind,
    Origin,
    RunDone,
    Span,
    StartRun,
)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures of one generation; None where there is nothing to measure.

    Attributes
    ----------
    ttft_s : float or None
        Seconds from the start to the first token.
    itl_s : float or None
        Mean seconds between tokens after the first.
    itl_p95_s : float or None
        The 95th percentile of the seconds between tokens; tokens of one commitment come at once.
    tokens_per_s : float or None
        Generated tokens by the seconds from the start to the last of them (wall time).
    generated_tokens : int
    drafted_tokens : int
        Tokens that the draft model proposed and that the target was asked about, or confirmed
        before it was asked.
    accepted_tokens : int
        Generated tokens that the draft model had proposed.
    acceptance_rate : float or None
        Accepted by drafted tokens.
    agreement_rate : float or None
        Where the draft model had proposed something: how often the target's token was there.
    runs : int
        All runs, prefill and cancelled ones included.
    runs_cancelled : int
        The sum of the next two.
    runs_cancelled_invalid : int
        Ruled out by the target's choice.
    runs_cancelled_superfluous : int
        Still in the pipeline at the end of the text.
    stage_utilization : list of float
        For each stage, the share of the time from start to last token that it computed.
    drafter_utilization : float or None
        The same of the drafter.
    layers_computed, layers_wasted : int
        Decoder layers evaluated over all stages and runs; those of cancelled runs.
    """

    ttft_s: float | None
    itl_s: float | None
    itl_p95_s: float | None
    tokens_per_s: float | None
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    acceptance_rate: float | None
    agreement_rate: float | None
    runs: int
    runs_cancelled: int
    runs_cancelled_invalid: int
    runs_cancelled_superfluous: int
    stage_utilization: list[float]
    drafter_utilization: float | None
    layers_computed: int
    layers_wasted: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name, as JSON takes them."""
        return asdict(self)


@dataclass(slots=True)
class Trace:
    """Events and commands in order, each with the seconds on the driver's clock.

    Attributes
    ----------
    stages : int
    records : list of (float, Event or Command)
    """

    stages: int
    records: list[tuple[float, Event | Command]] = field(default_factory=list)

    def add(self, time: float, what: Event | Command) -> None:
        """Record an event or a command, at a time in seconds."""
        self.records.append((time, what))

    def metrics(self) -> Metrics:
        """Return the figures up to now."""
        began = next((time for time, what in self.records if isinstance(what, Begin)), 0.0)
        commits = [(time, what) for time, what in self.records if isinstance(what, Commit)]
        origins = [origin for _, commit in commits for origin in commit.origins]
        times = [time for time, commit in commits for _ in commit.tokens]
        generated = len(origins)
        first, last = (commits[0][0], commits[-1][0]) if commits else (began, began)
        accepted = origins.count(Origin.ACCEPTED)
        contested = accepted + origins.count(Origin.CORRECTED)

        runs: dict[int, StartRun] = {}
        cancelled: dict[int, CancelReason] = {}
        spans: list[list[Span]] = [[] for _ in range(self.stages)]
        drafts: list[Span] = []
        wasted = drafted = 0
        root = -1  # the place in the text of the last committed token
        tested: set[tuple[int, int]] = set()  # drafted tokens that were in a run: (place, token)
        for _, what in self.records:
            match what:
                case StartRun():
                    runs[what.run] = what
                    if what.kind is Kind.PREFILL:
                        root = max(root, *what.batch.positions)
                    batch = zip(what.batch.positions, what.batch.tokens, strict=True)
                    proposed = [entry for entry in batch if entry[0] > root]
                    tested.update(proposed)
                    drafted += len(proposed)
                case Commit():
                    for token, origin in zip(what.tokens, what.origins, strict=True):
                        root += 1
                        # The target may confirm a token before the token's own run has started.
                        drafted += origin is Origin.ACCEPTED and (root, token) not in tested
                case CancelRuns():
                    cancelled.update(dict.fromkeys(what.runs, what.reason))
                case RunDone():
                    for stage, span in zip(spans, what.spans, strict=False):
                        stage.append(span)
                    if what.run in cancelled:
                        wasted += sum(span.layers for span in what.spans)
                case Drafted(span=Span()):
                    assert what.span is not None
                    drafts.append(what.span)
        reasons = list(cancelled.values())
        return Metrics(
            ttft_s=first - began if commits else None,
            itl_s=(last - first) / (generated - 1) if generated > 1 else None,
            itl_p95_s=_percentile_95(times),
            tokens_per_s=generated / (last - began) if last > began else None,
            generated_tokens=generated,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
            acceptance_rate=accepted / drafted if drafted else None,
            agreement_rate=accepted / contested if contested else None,
            runs=len(runs),
            runs_cancelled=len(reasons),
            runs_cancelled_invalid=reasons.count(CancelReason.INVALID),
            runs_cancelled_superfluous=reasons.count(CancelReason.SUPERFLUOUS),
            stage_utilization=[_share(stage, began, last) for stage in spans],
            drafter_utilization=_share(drafts, began, last) if drafts else None,
            layers_computed=sum(span.layers for stage in spans for span in stage),
            layers_wasted=wasted,
        )

    def __iter__(self) -> Iterator[tuple[float, Event | Command]]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def _percentile_95(times: list[float]) -> float | None:
    """Return the 95th percentile of the differences between neighbours, None without any."""
    gaps = sorted(after - before for before, after in pairwise(times))
    return gaps[max(0, math.ceil(0.95 * len(gaps)) - 1)] if gaps else None


def _share(spans: list[Span], began: float, ended: float) -> float:
    """Return the share of the time between ``began`` and ``ended`` that the spans cover."""
    if ended <= began:
        return 0.0
    busy = sum(max(0.0, min(span.ended, ended) - max(span.began, began)) for span in spans)
    return busy / (ended - began)
