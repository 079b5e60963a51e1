"""What the caller holds of a generation: text as it comes, the result, and a way to cancel.

The head writes from its loop; any number of threads and tasks read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from math import inf
from numbers import Real
from threading import TIMEOUT_MAX, Condition
from time import monotonic
from typing import Any, Literal, NoReturn, Protocol

from pipeinfer_dask.policies import Policy
from pipeinfer_dask.protocol.messages import Command, Commit, Event, Origin
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.protocol.sampling import Logprobs
from pipeinfer_dask.runtime.head.conversation import Conversation
from pipeinfer_dask.runtime.head.result import GenerationInterrupted, Piece, Result
from pipeinfer_dask.trace import Trace
from pipeinfer_dask.trace.picture import result_html

GLANCE_S = 0.5
"""Who waits looks up so often, for an interrupt that woke nobody."""

Status = Literal["queued", "running", "recovering", "finished", "stopped", "failed"]


class TextStream(Protocol):
    """Turns token ids into text, piece by piece."""

    def step(self, token: int) -> str | None:
        """Return the text that this token completes, if any."""
        ...

    def flush(self) -> str:
        """Return what is left at the end of the text."""
        ...


def _over(generation: Generation) -> None:
    """Cancel what is done: nothing is to be done, and so no engine is held."""


def _is_wait(timeout: Any) -> bool:
    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        return False
    return bool(timeout >= 0)  # type: ignore[operator]  # Real itself has no order


class Generation:
    """A generation on its way.

    Iterate over it (``for`` or ``async for``) to get the text as `Piece` strings, from
    the start each time; await it, or call `result`, for the `Result`. Whoever is interrupted
    while he waits (Ctrl-C, a notebook's stop button, a task that is cancelled) cancels it;
    whoever leaves (a ``break``, a timeout of `result`) does not. ``asyncio.shield(generation)``
    can be cancelled, and the generation goes on.

    Parameters
    ----------
    stream : TextStream
        Makes text of its tokens.
    cancel : callable
        Stops it, wherever it is driven from.

    Attributes
    ----------
    request : Request
    policy : Policy
    conversation : Conversation or None
        That it goes on with.
    stops : callable or None
        Told of each token; says whether the text ends with it.
    trace : Trace
        Grows as the generation goes on, and may be read meanwhile.
    """

    def __init__(
        self,
        request: Request,
        policy: Policy,
        stream: TextStream,
        trace: Trace,
        *,
        cancel: Callable[[Generation], None],
        stops: Callable[[int], bool] | None = None,
        conversation: Conversation | None = None,
    ) -> None:
        self.request = request
        self.conversation = conversation
        self.policy = policy
        self.stops = stops
        self.trace = trace
        self._stream = stream
        self._cancel = cancel
        self._changed = Condition()
        self._status: Status = "queued"
        self._position: int | None = None
        self._pieces: list[Piece] = []
        self._tokens: list[int] = []
        self._origins: list[Origin] = []
        self._logprobs: list[Logprobs] = []
        self._future: Future[Result] = Future()
        self._wakers: set[Callable[[], None]] = set()

    # --- for the caller -------------------------------------------------------------

    @property
    def strategy(self) -> str:
        """The policy's name."""
        return self.policy.name

    @property
    def status(self) -> Status:
        """Queued, running, recovering (from the loss of a node), finished, stopped or failed.

        Stopped is what the caller has cancelled.
        """
        return self._status

    @property
    def position(self) -> int | None:
        """Its place in the queue: 1 for the next one to begin.

        None where it does not wait. Known from the start, and anew whenever one begins or leaves;
        from a head on a worker that news takes its way.
        """
        return self._position

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        return list(self._tokens)

    def done(self) -> bool:
        """Whether there is a result, or an error.

        Returns
        -------
        bool
            From then on `result` does not wait.
        """
        return self._future.done()

    def cancel(self) -> None:
        """Stop generating. The result then holds the text so far; no effect once it is done."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result.

        Parameters
        ----------
        timeout : float, optional
            Most seconds to wait.

        Returns
        -------
        Result
            With the text so far where it was cancelled.

        Raises
        ------
        ValueError
            If that is no time to wait.
        TimeoutError
            If it takes longer. The generation goes on.
        KeyboardInterrupt
            If the wait is interrupted. The generation is cancelled.
        GenerationInterrupted
            If the pipeline was lost; it holds the text so far.
        """
        if timeout is not None and not _is_wait(timeout):
            raise ValueError(f"expected timeout as seconds of at least 0, or None, got {timeout!r}")
        deadline = inf if timeout is None else monotonic() + min(timeout, TIMEOUT_MAX)
        with self._cancelling(KeyboardInterrupt):
            while not self.done():
                # Not the future's own wait: an interrupt just before it sleeps wakes nobody.
                left = deadline - monotonic()
                if left <= 0:
                    raise TimeoutError(f"no result after {timeout:g} s; the generation goes on")
                with self._changed:
                    if not self.done():
                        self._changed.wait(min(GLANCE_S, left))
        return self._future.result(0)

    def __iter__(self) -> Iterator[Piece]:
        seen = 0
        with self._cancelling(KeyboardInterrupt):
            while True:
                with self._changed:
                    while len(self._pieces) == seen and not self.done():
                        self._changed.wait(GLANCE_S)
                    new = self._pieces[seen:]
                if not new:
                    break
                seen += len(new)
                yield from new
        self.result(0)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            # A reader whose loop is closed has left without a word.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._wakers.add(wake)
        try:
            seen = 0
            while True:
                changed.clear()
                done = self.done()
                for piece in self._pieces[seen:]:
                    seen += 1
                    yield piece
                if done and seen == len(self._pieces):
                    break
                if not done:
                    with self._cancelling(asyncio.CancelledError), suppress(TimeoutError):
                        async with asyncio.timeout(GLANCE_S):
                            await changed.wait()
        finally:
            with self._changed:
                self._wakers.discard(wake)
        self.result(0)

    def __await__(self) -> Generator[Any, None, Result]:
        return self._wait().__await__()

    async def _wait(self) -> Result:
        future = asyncio.wrap_future(self._future)
        with self._cancelling(asyncio.CancelledError):
            while not future.done():  # a signal cancels a cell's task, but wakes no loop
                await asyncio.wait([future], timeout=GLANCE_S)
        return future.result()

    @contextmanager
    def _cancelling(self, interrupt: type[BaseException]) -> Iterator[None]:
        try:
            yield
        except interrupt:
            self.cancel()
            raise

    def _repr_html_(self) -> str:
        return result_html(self.trace, f"{self.strategy}, {self._status}")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a generation can't be sent to workers or copied: wait for it here, and send its result"
        )

    def __repr__(self) -> str:
        return f"<Generation {self._status}, {self.strategy}, {len(self._tokens)} tokens>"

    # --- for the head -----------------------------------------------------------------

    def wait_in_line(self, position: int) -> None:
        """Note where it stands in the queue.

        :meta private:

        Parameters
        ----------
        position : int
            1 for the next one to begin.
        """
        self._position = position

    def begin(self) -> None:
        """Note that the head has turned to it.

        :meta private:
        """
        self._position, self._status = None, "running"

    def recover(self) -> None:
        """Note that a lost node is being replaced; the text goes on from where it is.

        :meta private:
        """
        self._position, self._status = None, "recovering"

    def record(self, time: float, what: Event | Command) -> None:
        """Note what happened. Who follows the trace finds a commit's text there before it.

        :meta private:

        Parameters
        ----------
        time : float, seconds
            On the head's clock.
        what : Event or Command
            What the machine was told, or said.
        """
        if isinstance(what, Commit):
            self._commit(what)
        self.trace.add(time, what)

    def _commit(self, commit: Commit) -> None:
        with self._changed:
            self._logprobs.extend(commit.logprobs)
            for token, origin in zip(commit.tokens, commit.origins, strict=True):
                self._tokens.append(token)
                self._origins.append(origin)
                text = self._stream.step(token)
                self.trace.pieces.append(text or "")
                if text:
                    self._pieces.append(Piece(text, origin))
        self._notify()

    def finish(self, reason: str) -> None:
        """Set the result: no token comes any more.

        :meta private:

        Parameters
        ----------
        reason : str
            The result's ``finish_reason``.
        """
        with self._changed:
            try:
                rest = self._stream.flush()
            except Exception as error:  # a tokenizer's: whoever waits must not do so for ever
                self.fail(error)
                return
            if rest and self._origins:
                self._pieces.append(Piece(rest, self._origins[-1]))
                self.trace.pieces[-1] += rest
            self._position, self._cancel = None, _over
            self._status = "stopped" if reason == "stopped" else "finished"
            sampling = self.request.sampling
            self._future.set_result(
                Result(
                    self.text,
                    self.token_ids,
                    list(self._origins),
                    reason,
                    self.strategy,
                    self.trace,
                    seed=sampling.seed if sampling is not None else None,
                    logprobs=self._known_logprobs,
                )
            )
        self._notify()

    @property
    def _known_logprobs(self) -> list[Logprobs] | None:
        sampling = self.request.sampling
        return list(self._logprobs) if sampling and sampling.logprobs else None

    def fail(self, error: BaseException) -> None:
        """Let whoever waits have the text so far, as a `GenerationInterrupted`.

        :meta private:

        Parameters
        ----------
        error : BaseException
            Its cause.
        """
        with self._changed:
            self._position, self._status, self._cancel = None, "failed", _over
            interrupted = GenerationInterrupted(
                str(error), self.text, self.token_ids, self.request, self._known_logprobs
            )
            interrupted.__cause__ = error
            self._future.set_exception(interrupted)
        self._notify()

    def part(self, error: BaseException) -> None:
        """Fail in a process that was forked, unless it is done: the head is the parent's.

        :meta private:

        Parameters
        ----------
        error : BaseException
            Its cause.
        """
        # Who waits, or holds a lock, does so in threads that are not here.
        self._changed, self._wakers = Condition(), set()
        if not self.done():
            self._future = Future()
            self.fail(error)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            wake()
