"""A world for the machine: stages and a drafter that compute nothing but keep real caches.

Each stage and the drafter hold, for each slot, the path of tokens that a model
would attend to there. What the target picks is a hash of the whole path, so a run
that attends to a wrong slot gives a wrong token, and the committed text differs
from `plain_text`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.tree import Tree
from pipeinfer_dask.drafting.expansion import Expansion, expansion_of
from pipeinfer_dask.policies import Policy
from pipeinfer_dask.protocol.messages import (
    AWAY,
    LEFT_OUT,
    NO_PARENT,
    NO_SLOT,
    Batch,
    Begin,
    CancelDraft,
    CancelRuns,
    Command,
    Commit,
    Drafted,
    DrafterBack,
    DrafterLost,
    Event,
    Finish,
    Origin,
    Prune,
    RunDone,
    RunTaken,
    StageLost,
    StagesBack,
    StartDraft,
    StartRun,
    Stop,
    WakeAt,
    Woken,
)
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.protocol.sampling import Logprobs, Sampling
from pipeinfer_dask.trace import Trace
from tests.core.invariants import validate

Path = tuple[int, ...]
GARBAGE: Path = (-1,)
"""What a cancelled run may attend to, where the run before it was skipped."""
VOCABULARY = 7
Queued = tuple[StartRun, bool, frozenset[int]]
"""A run, whether it was skipped, and the places of its batch that were pruned."""


def _digest(path: Path, salt: str) -> int:
    return int.from_bytes(hashlib.blake2b(repr((salt, path)).encode(), digest_size=4).digest())


def target_token(path: Path) -> int:
    if path is GARBAGE:
        return -1
    return _digest(path, "target") % VOCABULARY


def log_probability(path: Path) -> Logprobs:
    """Return what is told apart by the whole path, as a log-probability would be."""
    return Logprobs(-float(_digest(path, "log-probability")), ())


def plain_text(prompt: Path, count: int) -> Path:
    """Return what plain decoding gives."""
    path = prompt
    for _ in range(count):
        path += (target_token(path),)
    return path[len(prompt) :]


def choices(path: Path, quality: float) -> list[tuple[int, float]]:
    """Return what a draft model of this quality says after a path."""
    truth = target_token(path)
    right = _digest(path, "draft") % 1000 < quality * 1000
    first = truth if right else (truth + 1) % VOCABULARY
    confidence = 0.5 + _digest(path, "confidence") % 500 / 1000
    others = [(first + rank) % VOCABULARY for rank in range(1, 4)]
    return [(first, confidence), *((t, (1 - confidence) / 2**r) for r, t in enumerate(others))]


class Cache:
    """What a model attends to, slot by slot."""

    def __init__(self) -> None:
        self.paths: dict[int, Path] = {NO_PARENT: ()}

    def write(self, batch: Batch) -> list[Path]:
        paths = []
        for token, position, slot, parent in zip(
            batch.tokens, batch.positions, batch.slots, batch.parents, strict=True
        ):
            before = self.paths.get(parent, GARBAGE)
            path = GARBAGE if before is GARBAGE or len(before) != position else (*before, token)
            self.paths[slot] = path
            paths.append(path)
        return paths


Guesses = Callable[[Batch, list[Path], int], list[list[tuple[int, float]]]]
"""Of a draft model: a batch, the paths that end it, and how many choices for each are wanted."""


def draft_pass(draft: Expansion, cache: Cache, guesses: Guesses) -> bool:
    """Let the draft model take a pass; return whether there was one to take."""
    step = draft.next_batch()
    if step is None:
        return False
    batch, frontier = step
    paths = cache.write(batch)
    assert GARBAGE not in paths, "the draft model's cache is not what the machine thinks"
    draft.grow(guesses(batch, paths[len(paths) - frontier :], draft.width))
    return True


def answer(draft: Expansion) -> Drafted:
    """Return what the drafter says at the end of a draft."""
    asked = draft.draft
    proposals, evaluated = tuple(draft.proposals), tuple(draft.evaluated)
    return Drafted(asked.request, asked.generation, asked.draft, proposals, evaluated)


def check_slots(tree: Tree) -> None:
    """Check that a tree's slots are taken by its tokens, and by nothing else."""
    nodes = (*tree.committed(), *tree.speculation())
    assert tree.slots.taken() == {node.slot for node in nodes if node.slot != NO_SLOT}


class Moving(ABC):
    """What moves only when told to."""

    @abstractmethod
    def moves(self) -> list[Callable[[], None]]:
        """Return all that can happen next."""

    def run(self, choose: Callable[[int], int] = lambda _: 0, limit: int = 100_000) -> None:
        """Move until nothing moves; ``choose(n)`` says which of n moves comes next."""
        for _ in range(limit):
            moves = self.moves()
            if not moves:
                return
            moves[choose(len(moves))]()
        raise AssertionError("the world does not come to rest")


class World(Moving):
    """A pipeline of ``stages`` stages and a drafter; every queue moves only when told to.

    Parameters
    ----------
    quality : float
        How often the draft's first choice is the target's token.
    stop : tuple of int
        Tokens in a row that end the text.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        prompt: Path = (1, 2, 3),
        max_new_tokens: int = 12,
        stages: int = 2,
        quality: float = 0.7,
        spare: int = 16,
        prefill_chunk: int = 2,
        shares_cores: bool = False,
        end_tokens: frozenset[int] = frozenset(),
        stop: Path = (),
        begun: bool = True,
    ) -> None:
        self.request = Request(
            0,
            prompt,
            max_new_tokens,
            len(prompt) + max_new_tokens + spare,
            end_tokens,
            prefill_chunk,
            reads_ahead=True,
            sampling=Sampling(logprobs=1),
            shares_cores=shares_cores,
        )
        self.stop_tokens = stop
        self.heard: list[int] = []
        self.machine = Machine(self.request, policy, stops=self._stops if stop else None)
        self.quality = quality
        self.generations = 0
        self.lost_stages = self.lost_drafter = False
        self.silent_stage: int | None = None
        self.silent_drafter = False
        self.losses = 0
        self.count = stages
        self.build_stages()
        self.left_out = 0
        self.wanted_wake = False
        self.taken: deque[RunTaken] = deque()
        self.done: deque[RunDone] = deque()
        self.answers: deque[Drafted] = deque()
        self.draft_cache = Cache()
        self.draft: Expansion | None = None
        self.draft_cancelled = False
        self.tokens: list[int] = []
        self.origins: list[Origin] = []
        self.logprobs: list[Logprobs] = []
        self.commands: list[Command] = []
        self.computed = 0
        self.skipped = 0
        self.finished: str | None = None
        self.trace = Trace(stages)
        if begun:
            self.tell(Begin(0))

    def _stops(self, token: int) -> bool:
        self.heard.append(token)
        return tuple(self.heard[-len(self.stop_tokens) :]) == self.stop_tokens

    def build_stages(self) -> None:
        """Set up stages that hold nothing."""
        self.stages = [Cache() for _ in range(self.count)]
        self.queues: list[deque[Queued]] = [deque() for _ in range(self.count)]
        self.cancelled: list[set[int]] = [set() for _ in range(self.count)]
        self.pending_cancels: list[deque[int]] = [deque() for _ in range(self.count)]
        self.pruned: list[dict[int, set[int]]] = [{} for _ in range(self.count)]
        self.pending_prunes: list[deque[Prune]] = [deque() for _ in range(self.count)]

    # --- driving ------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        self.trace.add(0.0, event)
        for command in self.machine.handle(event):
            self.trace.add(0.0, command)
            self._carry_out(command)
        validate(self.machine)

    def _carry_out(self, command: Command) -> None:
        assert self.finished is None, "a command behind the end"
        if isinstance(command, CancelRuns | Prune) and self.lost_stages:
            return  # to stages of which some are gone, and the others hear of it otherwise
        self.commands.append(command)
        match command:
            case StartRun():
                assert not self.lost_stages, "a run for nobody"
                assert command.generation == self.machine.generation
                assert command.sampling is self.request.sampling
                self.queues[0].append((command, False, frozenset()))
            case CancelRuns():
                for pending in self.pending_cancels:
                    pending.extend(command.runs)
            case Prune():
                for prunes in self.pending_prunes:
                    prunes.append(command)
            case WakeAt():
                self.wanted_wake = True
            case StartDraft():
                assert not self.lost_drafter, "a draft for nobody"
                assert self.draft is None, "two drafts at once"
                assert command.sampling is self.request.sampling
                self.draft = expansion_of(command)
                self.draft_cancelled = False
            case CancelDraft():
                self.draft_cancelled = True
            case Commit():
                self.tokens.extend(command.tokens)
                self.origins.extend(command.origins)
                self.logprobs.extend(command.logprobs)
            case Finish():
                self.finished = command.reason

    def moves(self) -> list[Callable[[], None]]:
        moves: list[Callable[[], None]] = []
        for i, queue in enumerate(self.queues):
            if queue and i != self.silent_stage:
                moves.append(lambda i=i: self.compute(i))  # type: ignore[misc]
            if self.pending_cancels[i]:
                moves.append(lambda i=i: self.hear_cancel(i))  # type: ignore[misc]
            if self.pending_prunes[i]:
                moves.append(lambda i=i: self.hear_prune(i))  # type: ignore[misc]
        if self.wanted_wake:
            moves.append(self.wake)
        if self.taken:
            moves.append(lambda: self.tell(self.taken.popleft()))
        if self.done:
            moves.append(lambda: self.tell(self.done.popleft()))
        if self.draft is not None and not self.silent_drafter:
            moves.append(self.draft_step)
        if self.answers:
            moves.append(lambda: self.tell(self.answers.popleft()))
        if self.lost_stages:
            moves.append(self.rebuild_stages)
        if self.lost_drafter:
            moves.append(self.rebuild_drafter)
        if self.silent_stage is not None and self.finished is None:
            moves.append(self.lose_stages)
        if self.silent_drafter and self.finished is None:
            moves.append(self.lose_drafter)
        return moves

    def silence_stage(self, stage: int) -> None:
        """Have a stage do nothing more: that is noticed later, if the text does not end before."""
        self.silent_stage = stage

    def silence_drafter(self) -> None:
        """As `silence_stage`."""
        self.silent_drafter = True

    def lose_stages(self) -> None:
        """Lose a stage; what had come out before may still be on its way to the head."""
        self.losses += 1
        self.lost_stages = True
        self.silent_stage = None
        self.queues = [deque() for _ in self.queues]
        self.pending_cancels = [deque() for _ in self.queues]
        self.pending_prunes = [deque() for _ in self.queues]
        self.tell(StageLost(self.machine.generation))

    def rebuild_stages(self) -> None:
        self.lost_stages = False
        self.generations += 1
        self.build_stages()
        self.tell(StagesBack(self.generations))

    def lose_more(self) -> None:
        """Lose a node while others are being replaced: that generation never comes."""
        self.generations += 1

    def lose_all(self) -> None:
        """Lose stages and drafter at one moment."""
        self.lose_stages()
        self.lose_drafter()

    def lose_drafter(self) -> None:
        self.losses += 1
        self.lost_drafter = True
        self.silent_drafter = False
        self.draft = None
        self.tell(DrafterLost(self.machine.draft_generation))

    def rebuild_drafter(self) -> None:
        self.lost_drafter = False
        self.generations += 1
        self.draft_cache = Cache()
        self.tell(DrafterBack(self.generations))

    def old_news(self) -> None:
        """Have the machine hear what it has heard before, or what is long over."""
        stale, lost = (
            self.machine.stale,
            AWAY
            in (
                self.machine.generation,
                self.machine.draft_generation,
            ),
        )
        for old in range(self.generations + 1):
            events: list[Event] = []
            if old != self.machine.generation:
                events += [StageLost(old), RunTaken(0, old, 0), RunDone(0, old, 0, (1,))]
            if old != self.machine.draft_generation:
                events += [DrafterLost(old), Drafted(0, old, 0, (), ())]
            if not lost:
                events += [StagesBack(old), DrafterBack(old)]
            for event in events:
                stale += 1
                assert not self.machine.handle(event)
                assert self.machine.stale == stale

    def compute(self, i: int) -> None:
        run, skipped, out = self.queues[i].popleft()
        if i == 0:
            self.taken.append(RunTaken(0, run.generation, run.run))
        skipped = skipped or run.run in self.cancelled[i]
        out |= self.pruned[i].get(run.run, set())
        kept = [place for place in range(len(run.batch)) if place not in out]
        paths: dict[int, Path] = {}
        if not skipped:
            assert kept, "a pass of no token at all"
            batch = run.batch
            columns = (batch.tokens, batch.positions, batch.slots, batch.parents)
            rest = Batch(*(tuple(column[place] for place in kept) for column in columns))
            paths = dict(zip(kept, self.stages[i].write(rest), strict=True))
            self.left_out += len(out)
        self.computed += not skipped
        self.skipped += skipped
        if i + 1 < len(self.stages):
            self.queues[i + 1].append((run, skipped, out))
            return
        places = range(len(run.batch) - run.picks, len(run.batch))
        picked = tuple(target_token(paths[p]) if p in paths else LEFT_OUT for p in places)
        logprobs = tuple(log_probability(paths[p]) if p in paths else None for p in places)
        if skipped:
            self.done.append(RunDone(0, run.generation, run.run, None))
        else:
            self.done.append(RunDone(0, run.generation, run.run, picked, logprobs=logprobs))

    def hear_cancel(self, i: int) -> None:
        self.cancelled[i].add(self.pending_cancels[i].popleft())

    def hear_prune(self, i: int) -> None:
        prune = self.pending_prunes[i].popleft()
        for run, places in zip(prune.runs, prune.tokens, strict=True):
            self.pruned[i].setdefault(run, set()).update(places)

    def wake(self) -> None:
        self.wanted_wake = False
        self.tell(Woken(0))

    def draft_step(self) -> None:
        draft = self.draft
        assert draft is not None
        if self.draft_cancelled or not draft_pass(draft, self.draft_cache, self.guesses):
            self.draft = None
            self.answers.append(answer(draft))

    def guesses(self, batch: Batch, ends: list[Path], width: int) -> list[list[tuple[int, float]]]:
        """Return what the drafter says after the paths that end the batch."""
        return [choices(path, self.quality)[:width] for path in ends]

    def stop(self) -> None:
        self.tell(Stop(0))

    def check_end(self) -> None:
        """Check what must hold when nothing moves any more."""
        assert self.finished is not None, "at rest before the end"
        truth = plain_text(self.request.prompt, self.request.max_new_tokens)
        assert tuple(self.tokens) == truth[: len(self.tokens)]
        if self.finished == "length":
            assert len(self.tokens) == self.request.max_new_tokens
        if self.finished == "end_token":
            assert self.tokens[-1] in self.request.end_tokens
            assert not self.request.end_tokens & set(self.tokens[:-1])
        stop = self.stop_tokens
        if self.finished == "stop_string":
            assert tuple(self.tokens[-len(stop) :]) == stop
        if stop:
            before = range(len(self.tokens) - len(stop))
            assert all(tuple(self.tokens[i : i + len(stop)]) != stop for i in before)
        whole = (*self.request.prompt, *self.tokens)
        begun = range(len(self.request.prompt), len(whole))
        assert self.logprobs == [log_probability(whole[:i]) for i in begun]
        assert not self.machine.runs and not self.machine.drafting
        check_slots(self.machine.tree)
        metrics = self.trace.metrics()
        assert metrics.losses == self.losses
        assert metrics.accepted_tokens <= metrics.drafted_tokens
        assert metrics.generated_tokens == len(self.tokens)
