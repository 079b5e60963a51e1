"""What the machine is told (events) and what it asks for (commands).

All are frozen and hold plain numbers only, so that they can be logged, replayed,
compared and sent. Each names its request and its generation: the generation
counts rebuilt pipelines, so a message from before a rebuild is recognised and
dropped, never guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pipeinfer_dask.protocol.sampling import Logprobs, Sampling

NO_PARENT = -1
"""The parent slot of the first token of a text."""
NO_SLOT = -1
"""The slot of a token that no model has evaluated yet."""
AWAY = -1
"""The generation of what is lost, and not rebuilt yet."""
LEFT_OUT = -1
"""In a run's result: the token there was pruned on the way, so nothing was picked after it."""


def most_runs(stages: int) -> int:
    """Return how many runs of one request may be in a pipeline of so many stages at once.

    More than two for each stage, and three, would only queue somewhere; and one may start whatever
    else is under way: that of a text's last token, which nothing in flight goes on with.
    """
    return 2 * stages + 4


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens to evaluate in one pass, every parent before its children.

    Attributes
    ----------
    tokens, positions, slots : tuple of int, [n]
        Token id, place in the text, and place in the KV cache.
    parents : tuple of int, [n]
        Slot of the token before it in its own branch, or `NO_PARENT`. A token
        attends to its parent, to all that its parent attends to, and to itself.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    slots: tuple[int, ...]
    parents: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.tokens[part], self.positions[part], self.slots[part], self.parents[part])


class Kind(StrEnum):
    """Why a run was started."""

    PREFILL = "prefill"
    SINGLE = "single"
    SPECULATIVE = "speculative"


class CancelReason(StrEnum):
    """Why a run was cancelled (the paper's two kinds, and ours)."""

    INVALID = "invalid"
    """No token of it can be reached any more: the target chose another one before it."""
    SUPERFLUOUS = "superfluous"
    """The text has ended."""
    LOST = "lost"
    """A stage was lost, and with it all that was in the pipeline."""


class Origin(StrEnum):
    """Where a committed token came from."""

    ACCEPTED = "accepted"
    """The draft proposed it, and the target agreed."""
    CORRECTED = "corrected"
    """The target's own, against what the draft had proposed there."""
    PLAIN = "plain"
    """The target's own, where the draft had proposed nothing."""


@dataclass(frozen=True, slots=True)
class Span:
    """One stage's (or the drafter's) work on one run, in seconds on the driver's clock.

    ``layers`` counts the decoder layers that were computed: fewer than the stage
    has where a cancellation cut the run short.
    """

    began: float
    ended: float
    layers: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """A token that the draft model proposes to follow the token in slot ``parent``.

    Its own ``slot`` is `NO_SLOT` where the draft model has not evaluated it and won't.
    """

    token: int
    parent: int
    slot: int
    confidence: float


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """How far and how wide one draft may go, every branch by one token a pass.

    Attributes
    ----------
    size : int
        Most tokens to propose; 0 only fills the draft model's cache.
    cutoff : float
        A branch ends where the draft's first choice is less probable than this.
    split : float
        A second choice at least this probable opens a branch of its own ...
    branches : int
        ... while there are fewer branches than this.
    last_position : int, optional
        No proposal lies behind this place in the text.
    """

    size: int
    cutoff: float = 0.0
    split: float = 1.0
    branches: int = 1
    last_position: int | None = None


@dataclass(frozen=True, slots=True)
class TreePlan:
    """Grow a tree best-first: in each pass the tokens that the text reaches most likely.

    Attributes
    ----------
    size : int
        Most proposals to evaluate; what hangs below the last of them is proposed all the same.
    passes : int
        Most passes of the draft model.
    breadth : int
        Most tokens to extend in one pass.
    width : int
        Most choices to propose after one token.
    floor : float
        A second or later choice is proposed only if it is at least this probable.
    chances : tuple of float, [frontier]
        How likely the text reaches each frontier token.
    calibration : tuple of float
        What confidences of 0, 1/n, ..., 1 are worth; empty: themselves.
    least : float
        Nothing is extended, behind the frontier, that the text reaches less likely than this.
    last_position : int, optional
        No proposal lies behind this place in the text.
    """

    size: int
    passes: int
    breadth: int
    width: int
    floor: float
    chances: tuple[float, ...]
    calibration: tuple[float, ...] = ()
    least: float = 0.0
    last_position: int | None = None


# --- commands -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartRun:
    """Start a run. The last stage picks a token after each of its last ``picks`` tokens.

    The settings of the picks travel with each run: the links are in no order to one another,
    so that nothing sent once could be relied on to be there. ``cache`` names the KV cache that
    the batch's slots are of; a stage makes it when it first hears of it.
    """

    request: int
    generation: int
    run: int
    kind: Kind
    batch: Batch
    picks: int
    sampling: Sampling | None = None
    cache: int = 0


@dataclass(frozen=True, slots=True)
class CancelRuns:
    """Tell every stage to skip what is left of these runs."""

    request: int
    generation: int
    runs: tuple[int, ...]
    reason: CancelReason


@dataclass(frozen=True, slots=True)
class Prune:
    """Tell every stage to leave out these tokens of runs that go on without them.

    ``tokens`` holds for each of the runs the places of the tokens in its batch.
    """

    request: int
    generation: int
    runs: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class StartDraft:
    """Ask the drafter to evaluate ``batch`` and to extend the last ``frontier`` tokens of it.

    ``slots`` are reserved for the proposals (of a `TreePlan`: for those that it evaluates),
    used in order. ``cache`` is as in `StartRun`.
    """

    request: int
    generation: int
    draft: int
    batch: Batch
    frontier: int
    slots: tuple[int, ...]
    plan: DraftPlan | TreePlan
    sampling: Sampling | None = None
    cache: int = 0


@dataclass(frozen=True, slots=True)
class CancelDraft:
    """Tell the drafter to answer with what it has: nobody waits for the rest."""

    request: int
    generation: int
    draft: int


@dataclass(frozen=True, slots=True)
class Release:
    """Tell stages and drafter that nothing of this request is in flight, nor will be.

    They forget what was cancelled of it, and give its KV cache to others; with ``cache`` None
    they keep that for the request that goes on with the text.
    """

    request: int
    generation: int
    cache: int | None


@dataclass(frozen=True, slots=True)
class Commit:
    """These tokens are final, in order; ``logprobs`` is empty unless they were asked for."""

    request: int
    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The request is over and nothing of it is in flight any more."""

    request: int
    reason: str


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Report `Woken` at this time, in seconds on the clock of ``now``; replaces an earlier wish."""

    request: int
    time: float


Command = StartRun | CancelRuns | Prune | StartDraft | CancelDraft | Commit | Finish | WakeAt

# --- events -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Start the request."""

    request: int


@dataclass(frozen=True, slots=True)
class RunTaken:
    """The first stage has begun this run: its queue has room again."""

    request: int
    generation: int
    run: int


@dataclass(frozen=True, slots=True)
class RunDone:
    """A run has left the pipeline.

    ``tokens`` holds the target's pick after each of the run's last ``picks``
    tokens (`LEFT_OUT` after one that was pruned on the way), or is None for a run
    that a stage skipped. ``spans`` has one entry for each stage. ``logprobs`` has one for
    each pick, None where nothing was picked; it is empty unless they were asked for.
    """

    request: int
    generation: int
    run: int
    tokens: tuple[int, ...] | None
    spans: tuple[Span, ...] = ()
    logprobs: tuple[Logprobs | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Drafted:
    """The drafter's answer: what it proposes, and the slots that its own cache now holds."""

    request: int
    generation: int
    draft: int
    proposals: tuple[Proposal, ...]
    evaluated: tuple[int, ...]
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class StageLost:
    """A stage of this generation is lost, or a link between two.

    With it is lost what was in the pipeline, and what all stages held of the texts. Like the
    next three this is said to all requests at once.
    """

    generation: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StagesBack:
    """All stages stand again, as another generation: they hold nothing of any text."""

    generation: int


@dataclass(frozen=True, slots=True)
class DrafterLost:
    """The drafter of this generation is lost, with all that it held."""

    generation: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DrafterBack:
    """There is a drafter again, of another generation: it holds nothing of any text."""

    generation: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The user wants no more of this request."""

    request: int


@dataclass(frozen=True, slots=True)
class Woken:
    """The time that `WakeAt` named has come."""

    request: int


PipelineEvent = StageLost | StagesBack | DrafterLost | DrafterBack
"""What concerns all requests of a pipeline."""

Event = Begin | RunTaken | RunDone | Drafted | Stop | Woken | PipelineEvent
