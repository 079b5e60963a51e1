"""A run as it travels from stage to stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from pipeinfer_dask.models.stage import HiddenStates
from pipeinfer_dask.protocol.messages import Batch, Span, StartRun
from pipeinfer_dask.protocol.sampling import Logprobs

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunPass:
    """A run on its way through the pipeline: what travels from stage to stage.

    Attributes
    ----------
    run : StartRun
    hidden : ndarray, [n - left out, hidden_size], or None
        None before the first stage, behind the last, and once the run is skipped.
    tokens : tuple of int, [picks], or None
        The target's picks, `LEFT_OUT` where there is none; only behind the last stage.
    spans : tuple of Span
        One for each stage passed so far.
    skipped : bool
        A stage saw the run cancelled. It still travels to the end, without its
        payload, so that every stage and the driver see each run go by in order.
    left_out : tuple of int
        Places in the run's batch that were pruned on the way, ascending.
    logprobs : tuple of Logprobs or None, [picks]
        None where there is no pick; empty unless they were asked for.
    """

    run: StartRun
    hidden: HiddenStates | None = None
    tokens: tuple[int, ...] | None = None
    spans: tuple[Span, ...] = ()
    skipped: bool = False
    left_out: tuple[int, ...] = ()
    logprobs: tuple[Logprobs | None, ...] = ()

    @property
    def batch(self) -> Batch:
        """What is left of the run's batch."""
        whole = self.run.batch
        if not self.left_out:
            return whole
        out = set(self.left_out)
        kept = [place for place in range(len(whole)) if place not in out]
        columns = (whole.tokens, whole.positions, whole.slots, whole.parents)
        return Batch(*(tuple(column[place] for place in kept) for column in columns))

    def without(self, places: Iterable[int]) -> RunPass:
        """Return the same run, its hidden states too, without these places of its batch."""
        before, out = set(self.left_out), {*self.left_out, *places}
        left_out = tuple(sorted(out))
        if left_out == self.left_out:
            return self
        hidden = self.hidden
        if hidden is not None:
            held = [p for p in range(len(self.run.batch)) if p not in before]
            hidden = hidden[[row for row, place in enumerate(held) if place not in out]]
        return replace(self, hidden=hidden, left_out=left_out)

    def whole(self, picks: tuple[T, ...], missing: T) -> tuple[T, ...]:
        """Return what belongs to the picks, with ``missing`` in the places of what was left out."""
        if not picks or not self.left_out:
            return picks
        picked = iter(picks)
        out = set(self.left_out)
        return tuple(missing if p in out else next(picked) for p in range(len(self.run.batch)))
