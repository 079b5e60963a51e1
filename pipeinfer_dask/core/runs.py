"""Runs as futures, chained to the run that holds their prefix."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeinfer_dask.core.drafts import ProtocolError
from pipeinfer_dask.core.tree import Node
from pipeinfer_dask.protocol.messages import LEFT_OUT, CancelReason, Kind
from pipeinfer_dask.protocol.sampling import Logprobs

RunStatus = Literal["pending", "finished", "cancelled"]


class RunCancelledError(RuntimeError):
    """The result of a cancelled run was asked for."""


@dataclass(slots=True, eq=False)
class RunFuture:
    """One pass of a micro-batch through the target's pipeline.

    Has the states and the method names of `distributed.Future`.

    Attributes
    ----------
    id : int
        Counts from 0 in each request.
    kind : Kind
    nodes : tuple of Node
        What it evaluates, parents first.
    parents : tuple of RunFuture
        The runs in flight that hold what these tokens attend to. When all of them are
        cancelled, so is this run.
    picks : int
        The target picks a token after each of the last ``picks`` nodes.
    started : float
        When it was started, in seconds.
    live : int
        Nodes that can still become part of the text.
    status : {"pending", "finished", "cancelled"}
    reason : CancelReason or None
        Why it was cancelled.
    """

    id: int
    kind: Kind
    nodes: tuple[Node, ...]
    parents: tuple[RunFuture, ...] = ()
    picks: int = 0
    started: float = 0.0
    live: int = field(init=False)
    status: RunStatus = "pending"
    reason: CancelReason | None = None
    _tokens: tuple[int, ...] = ()
    _children: list[RunFuture] = field(default_factory=list)
    _callbacks: list[Callable[[RunFuture], object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.live = len(self.nodes)
        for parent in self.parents:
            parent._children.append(self)

    @property
    def parent(self) -> RunFuture | None:
        """The run that holds the first token's prefix, if it was in flight."""
        return self.parents[0] if self.parents else None

    def done(self) -> bool:
        return self.status != "pending"

    def cancelled(self) -> bool:
        return self.status == "cancelled"

    def result(self) -> tuple[int, ...]:
        """Return the tokens that the target picked.

        Raises
        ------
        RunCancelledError
            If the run was cancelled.
        RuntimeError
            If it is still pending.
        """
        if self.status == "cancelled":
            raise RunCancelledError(f"run {self.id} was cancelled: {self.reason}")
        if self.status == "pending":
            raise RuntimeError(f"run {self.id} is still in the pipeline: await it first")
        return self._tokens

    def add_done_callback(self, callback: Callable[[RunFuture], object]) -> None:
        """Call ``callback(run)`` when the run is done; at once if it is."""
        if self.done():
            callback(self)
        else:
            self._callbacks.append(callback)

    def finish(self, tokens: Sequence[int]) -> None:
        """Set the result."""
        self._tokens = tuple(tokens)
        self._settle("finished")

    def picked(
        self, tokens: Sequence[int] | None, logprobs: Sequence[Logprobs | None] = ()
    ) -> None:
        """Set the result, and note on each node what the target has put after it.

        Raises
        ------
        ProtocolError
            If these can't be the picks of this run.
        """
        if tokens is None:
            raise ProtocolError(f"run {self.id} was skipped, but nobody had cancelled it")
        if len(tokens) != self.picks:
            raise ProtocolError(
                f"run {self.id} was asked for {self.picks} tokens and came with {len(tokens)}"
            )
        self.finish(tokens)
        nodes = self.nodes[len(self.nodes) - self.picks :]
        for node, token, asked in zip(nodes, tokens, logprobs or (None,) * self.picks, strict=True):
            if token != LEFT_OUT:
                node.next, node.next_logprobs = token, asked
            elif node.alive:
                raise ProtocolError(f"run {self.id} left out token {node.token}, which is alive")

    def cancel(self, reason: CancelReason = CancelReason.INVALID) -> bool:
        """Cancel this run, and each run that builds on nothing but cancelled ones.

        Returns
        -------
        bool
            False if it was done already.
        """
        if self.done():
            return False
        self.reason = reason
        children = self._children
        self._settle("cancelled")
        for child in children:
            if all(parent.cancelled() for parent in child.parents):
                child.cancel(reason)
        return True

    def _settle(self, status: RunStatus) -> None:
        self.status = status
        # A settled run must not keep the chain behind or before it in memory.
        callbacks, self._callbacks, self._children = self._callbacks, [], []
        if status == "finished":
            self.parents = ()
        for callback in callbacks:
            callback(self)

    def __await__(self) -> Generator[Any, None, tuple[int, ...]]:
        if not self.done():
            import asyncio  # only whoever awaits needs a loop: the machine itself has none

            loop = asyncio.get_running_loop()
            waiter = loop.create_future()

            def wake() -> None:
                if not waiter.done():
                    waiter.set_result(None)

            self.add_done_callback(lambda _: loop.call_soon_threadsafe(wake))
            yield from waiter
        return self.result()
