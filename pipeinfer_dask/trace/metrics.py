"""The figures of a generation, as a fold over its record: each entry costs the same."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from pipeinfer_dask.protocol.messages import (
    Begin,
    CancelReason,
    CancelRuns,
    Command,
    Commit,
    Drafted,
    DrafterLost,
    Event,
    Kind,
    Origin,
    RunDone,
    Span,
    StageLost,
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
    prefilled_tokens : int
        Tokens that were read before the first one came: the prompt, less what a conversation's
        cache held of it. What is read again after a loss counts, too.
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
        The sum of the next three.
    runs_cancelled_invalid : int
        Ruled out by the target's choice.
    runs_cancelled_superfluous : int
        Still in the pipeline at the end of the text.
    runs_cancelled_lost : int
        In the pipeline when a stage of it was lost.
    losses : int
        How often a stage, a link or the drafter was lost meanwhile.
    stage_utilization : list of float
        For each stage, the share of the time from start to last token that it computed.
    drafter_utilization : float or None
        The same of the drafter.
    layers_computed, layers_wasted, layers_saved : int
        Decoder layers evaluated over all stages and runs; those of cancelled runs; and those
        that cancelled runs were spared.
    """

    ttft_s: float | None
    itl_s: float | None
    itl_p95_s: float | None
    tokens_per_s: float | None
    generated_tokens: int
    prefilled_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    acceptance_rate: float | None
    agreement_rate: float | None
    runs: int
    runs_cancelled: int
    runs_cancelled_invalid: int
    runs_cancelled_superfluous: int
    runs_cancelled_lost: int
    losses: int
    stage_utilization: list[float]
    drafter_utilization: float | None
    layers_computed: int
    layers_wasted: int
    layers_saved: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name, as JSON takes them.

        Returns
        -------
        dict
            The attributes.
        """
        return asdict(self)


class Figures(NamedTuple):
    """Counts up to a moment.

    Attributes
    ----------
    time : float, seconds
    generated, drafted, accepted : int
        Tokens.
    computed, wasted : int
        Layers.
    busy : tuple of float, seconds, [1 + stages]
        What the drafter and each stage worked, of what was known then.
    """

    time: float
    generated: int
    drafted: int
    accepted: int
    computed: int
    wasted: int
    busy: tuple[float, ...]


class Tally:
    """Counts what `Metrics` says, entry by entry.

    Parameters
    ----------
    stages : int

    Attributes
    ----------
    began, first, last : float, seconds
        The begin, the first token and the last.
    generated, drafted, accepted, contested : int
        Tokens; contested are those where the draft model had proposed something.
    computed, wasted : int
        Layers.
    busy : list of float, seconds, [stages]
    drafting : float, seconds
    """

    def __init__(self, stages: int) -> None:
        self.began = self.first = self.last = 0.0
        self.generated = self.drafted = self.accepted = self.contested = 0
        self.computed = self.wasted = 0
        self.busy = [0.0] * stages
        self.drafting = 0.0
        self._begun = False
        self._prefilled = 0
        self._times: list[float] = []
        self._runs = self._losses = 0
        self._reasons: dict[int, CancelReason] = {}
        self._layers = [0] * stages
        self._spared = [0] * stages  # cancelled runs that have passed each stage
        # Work that ended after the last token, by stage; the drafter's under -1.
        self._overtime: list[tuple[int, Span]] = []
        self._drafts = 0
        self._root = -1  # the place in the text of the last committed token
        # Drafted tokens that were in a run: (place, token).
        self._tested: set[tuple[int, int]] = set()

    def add(self, time: float, what: Event | Command) -> None:
        """Take an entry of the record."""
        match what:
            case Begin():
                if not self._begun:
                    self._begun = True
                    self.began = self.first = self.last = time
            case StartRun():
                self._started(what)
            case Commit():
                self._committed(time, what)
            case StageLost() | DrafterLost():
                self._losses += 1
            case CancelRuns():
                self._reasons.update(dict.fromkeys(what.runs, what.reason))
            case RunDone():
                self._done(what)
            case Drafted(span=Span() as span):
                self._drafts += 1
                self.drafting += span.ended - max(span.began, self.began)
                self._overtime.append((-1, span))

    def _started(self, run: StartRun) -> None:
        self._runs += 1
        if run.kind is Kind.PREFILL:
            self._prefilled += len(run.batch)
            self._root = max(self._root, *run.batch.positions)
        batch = zip(run.batch.positions, run.batch.tokens, strict=True)
        proposed = [entry for entry in batch if entry[0] > self._root]
        self._tested.update(proposed)
        self.drafted += len(proposed)

    def _committed(self, time: float, commit: Commit) -> None:
        if not self._times:
            self.first = time
        self.last = time
        for token, origin in zip(commit.tokens, commit.origins, strict=True):
            self._times.append(time)
            self.generated += 1
            self._root += 1
            accepted = origin is Origin.ACCEPTED
            self.accepted += accepted
            self.contested += origin is not Origin.PLAIN
            # The target may confirm a token before the token's own run has started.
            self.drafted += accepted and (self._root, token) not in self._tested
        self._overtime = [entry for entry in self._overtime if entry[1].ended > time]

    def _done(self, run: RunDone) -> None:
        cancelled = run.run in self._reasons
        for stage, span in enumerate(run.spans[: len(self.busy)]):
            self.busy[stage] += span.ended - max(span.began, self.began)
            self.computed += span.layers
            self._layers[stage] = max(self._layers[stage], span.layers)
            self.wasted += span.layers if cancelled else 0
            self._spared[stage] += cancelled
            if span.ended > self.last:
                self._overtime.append((stage, span))

    def figures(self, time: float) -> Figures:
        """Return the counts, as those of a time in seconds."""
        counts = (self.generated, self.drafted, self.accepted, self.computed, self.wasted)
        return Figures(time, *counts, (self.drafting, *self.busy))

    def metrics(self) -> Metrics:
        """Return the figures up to now."""
        generated, took = self.generated, self.last - self.began
        overtime = [0.0] * (len(self.busy) + 1)  # the last one is the drafter's
        for row, span in self._overtime:
            overtime[row] += max(0.0, span.ended - max(span.began, self.last))
        shares = [
            min(1.0, max(0.0, (busy - late) / took)) if took > 0 else 0.0
            for busy, late in zip([*self.busy, self.drafting], overtime, strict=True)
        ]
        reasons = list(self._reasons.values())
        whole = sum(
            count * layers for count, layers in zip(self._spared, self._layers, strict=True)
        )
        return Metrics(
            ttft_s=self.first - self.began if generated else None,
            itl_s=(self.last - self.first) / (generated - 1) if generated > 1 else None,
            itl_p95_s=_percentile_95(self._times),
            tokens_per_s=generated / took if took > 0 else None,
            generated_tokens=generated,
            prefilled_tokens=self._prefilled,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            acceptance_rate=self.accepted / self.drafted if self.drafted else None,
            agreement_rate=self.accepted / self.contested if self.contested else None,
            runs=self._runs,
            runs_cancelled=len(reasons),
            runs_cancelled_invalid=reasons.count(CancelReason.INVALID),
            runs_cancelled_superfluous=reasons.count(CancelReason.SUPERFLUOUS),
            runs_cancelled_lost=reasons.count(CancelReason.LOST),
            losses=self._losses,
            stage_utilization=shares[:-1],
            drafter_utilization=shares[-1] if self._drafts else None,
            layers_computed=self.computed,
            layers_wasted=self.wasted,
            layers_saved=whole - self.wasted,
        )


def figure(value: float | None, form: str, scale: float = 1.0) -> str:
    """Return a figure as it is shown; a dash where there was nothing to measure."""
    return "-" if value is None else form.format(value * scale)


def _percentile_95(times: list[float]) -> float | None:
    """Return the 95th percentile of the differences between neighbours, None without any."""
    gaps = sorted(after - before for before, after in pairwise(times))
    return gaps[max(0, math.ceil(0.95 * len(gaps)) - 1)] if gaps else None
