"""Several requests on one world of stages and a drafter; see `tests.core.world`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.core.sharing import Sharing
from pipeinfer_dask.drafting.expansion import Expansion, expansion_of
from pipeinfer_dask.policies import Policy
from pipeinfer_dask.protocol.messages import (
    AWAY,
    LEFT_OUT,
    Batch,
    Begin,
    CancelDraft,
    CancelRuns,
    Commit,
    DrafterBack,
    DrafterLost,
    Event,
    Finish,
    Prune,
    RunDone,
    RunTaken,
    Span,
    StageLost,
    StagesBack,
    StartDraft,
    StartRun,
    Stop,
    WakeAt,
    Woken,
)
from pipeinfer_dask.protocol.request import Request
from tests.core.invariants import validate
from tests.core.world import (
    Cache,
    Moving,
    Path,
    answer,
    check_slots,
    choices,
    draft_pass,
    plain_text,
    target_token,
)

Key = tuple[int, int]
"""A request, and the number of its run or draft."""


@dataclass
class Asked:
    """A request, and what came of it."""

    request: Request
    machine: Machine
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    wanted_wake: bool = False


class SharedWorld(Moving):
    """Stages and one drafter for any number of requests; every queue moves only when told to."""

    def __init__(
        self, stages: int = 2, quality: float = 0.7, *, shares_cores: bool = False
    ) -> None:
        self.shares_cores = shares_cores
        self.sharing = Sharing()
        self.asked: dict[int, Asked] = {}
        self.quality = quality
        self.queues: list[deque[tuple[StartRun, bool]]] = [deque() for _ in range(stages)]
        self.caches: list[dict[int, Cache]] = [{} for _ in range(stages)]
        self.draft_caches: dict[int, Cache] = {}
        self.cancelled: set[Key] = set()
        self.pruned: dict[Key, set[int]] = {}
        self.taken: deque[RunTaken] = deque()
        self.done: deque[RunDone] = deque()
        self.draft: Expansion | None = None
        self.draft_cancelled = False
        self.generation = self.draft_generation = 0
        self.away: list[StagesBack | DrafterBack] = []
        """What is lost, and comes back."""
        self.order: list[Key] = []
        """The requests whose runs were started, and the tokens of each run, in order."""

    def ask(self, policy: Policy, prompt: Path, max_new_tokens: int = 12, spare: int = 16) -> Asked:
        """Add a request."""
        number = len(self.asked)
        capacity = len(prompt) + max_new_tokens + spare
        request = Request(
            number,
            prompt,
            max_new_tokens,
            capacity,
            prefill_chunk=2,
            shares_cores=self.shares_cores,
        )
        machine = Machine(
            request,
            policy,
            generation=AWAY if self.is_away(StagesBack) else self.generation,
            draft_generation=AWAY if self.is_away(DrafterBack) else self.draft_generation,
        )
        asked = self.asked[number] = Asked(request, machine)
        self.sharing.join(asked.machine)
        self.tell(Begin(number))
        return asked

    def stop(self, asked: Asked) -> None:
        self.tell(Stop(asked.request.id))

    def is_away(self, what: type[StagesBack | DrafterBack]) -> bool:
        return any(isinstance(back, what) for back in self.away)

    def lose_stages(self) -> None:
        """Lose all stages and what is in flight; that they are back is another move."""
        if self.is_away(StagesBack):
            return
        for queue in self.queues:
            queue.clear()
        self.taken.clear()
        self.done.clear()
        for caches in self.caches:
            caches.clear()
        self.away.append(StagesBack(self.generation + 1))
        self.tell(StageLost(self.generation))
        self.generation += 1

    def lose_drafter(self) -> None:
        if self.is_away(DrafterBack):
            return
        self.draft = None
        self.draft_caches.clear()
        self.away.append(DrafterBack(self.draft_generation + 1))
        self.tell(DrafterLost(self.draft_generation))
        self.draft_generation += 1

    def tell(self, event: Event) -> None:
        for command in self.sharing.handle(event):
            asked = self.asked[command.request]
            assert asked.finished is None, "a command behind the end"
            match command:
                case StartRun():
                    wanted = [
                        r for r, _ in self.queues[0] if (r.request, r.run) not in self.cancelled
                    ]
                    assert len(wanted) < 2 or len(self.sharing.machines) == 1
                    self.order.append((command.request, len(command.batch)))
                    self.queues[0].append((command, False))
                case CancelRuns():
                    self.cancelled.update((command.request, run) for run in command.runs)
                case Prune():
                    for run, places in zip(command.runs, command.tokens, strict=True):
                        self.pruned.setdefault((command.request, run), set()).update(places)
                case StartDraft():
                    assert self.draft is None, "two drafts at once"
                    self.draft, self.draft_cancelled = expansion_of(command), False
                case CancelDraft():
                    assert self.draft is not None and self.draft.draft.request == command.request
                    self.draft_cancelled = True
                case Commit():
                    asked.tokens.extend(command.tokens)
                case WakeAt():
                    asked.wanted_wake = True
                case Finish():
                    asked.finished = command.reason
                    for caches in (*self.caches, self.draft_caches):
                        caches.pop(command.request, None)
        for asked in self.asked.values():
            if asked.finished is None:
                validate(asked.machine)

    def moves(self) -> list[Callable[[], None]]:
        moves: list[Callable[[], None]] = [
            lambda i=i: self.compute(i)  # type: ignore[misc]
            for i, queue in enumerate(self.queues)
            if queue
        ]
        if self.taken:
            moves.append(lambda: self.tell(self.taken.popleft()))
        if self.done:
            moves.append(lambda: self.tell(self.done.popleft()))
        if self.draft is not None:
            moves.append(self.draft_step)
        if self.away:
            moves.append(lambda: self.tell(self.away.pop(0)))
        moves.extend(
            lambda asked=asked: self.wake(asked)  # type: ignore[misc]
            for asked in self.asked.values()
            if asked.wanted_wake and asked.finished is None
        )
        return moves

    def wake(self, asked: Asked) -> None:
        asked.wanted_wake = False
        self.tell(Woken(asked.request.id))

    def compute(self, i: int) -> None:
        run, skipped = self.queues[i].popleft()
        key = (run.request, run.run)
        if i == 0:
            self.taken.append(RunTaken(run.request, run.generation, run.run))
        skipped = skipped or key in self.cancelled
        paths: list[Path] = []
        if not skipped:
            cache = self.caches[i].setdefault(run.cache, Cache())
            paths = cache.write(run.batch)
        if i + 1 < len(self.queues):
            self.queues[i + 1].append((run, skipped))
            return
        out = self.pruned.get(key, set())
        picks = range(len(run.batch) - run.picks, len(run.batch))
        tokens = None
        if not skipped:
            tokens = tuple(LEFT_OUT if p in out else target_token(paths[p]) for p in picks)
        spans = tuple(Span(0.0, 0.0, 1) for _ in self.queues)
        self.done.append(RunDone(run.request, run.generation, run.run, tokens, spans))

    def draft_step(self) -> None:
        draft = self.draft
        assert draft is not None
        caches, number = self.draft_caches, draft.draft.cache
        if self.draft_cancelled or not draft_pass(
            draft, caches.setdefault(number, Cache()), self.guesses
        ):
            self.draft = None
            self.tell(answer(draft))

    def guesses(self, _: Batch, ends: list[Path], width: int) -> list[list[tuple[int, float]]]:
        return [choices(path, self.quality)[:width] for path in ends]

    def check_end(self) -> None:
        """Check what must hold when nothing moves any more."""
        for asked in self.asked.values():
            assert asked.finished is not None, "at rest before the end"
            text = plain_text(asked.request.prompt, asked.request.max_new_tokens)
            assert tuple(asked.tokens) == text[: len(asked.tokens)]
            assert asked.finished == "stopped" or len(asked.tokens) == len(text)
            check_slots(asked.machine.tree)
        assert not self.sharing.machines
        assert all(not caches for caches in (*self.caches, self.draft_caches))


def in_turns(order: Sequence[int]) -> bool:
    """Say whether nobody has two turns before everybody has had one."""
    count = len(set(order))
    return all(len({*order[i : i + count]}) == count for i in range(len(order) - count + 1))
