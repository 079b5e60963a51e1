"""How worker processes of our own end: at once, whatever they do, and without a word."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from threading import Event, Thread, current_thread, main_thread
from typing import Any, Self
from weakref import finalize

import psutil
from distributed import LocalCluster, Nanny, SpecCluster
from distributed.deploy.spec import ProcessInterface
from distributed.diskutils import WorkDir
from distributed.node import ServerNode
from distributed.process import AsyncProcess

LOOK_S = 0.1
"""While workers that start are to end, look so often for those that a nanny starts meanwhile."""


@contextmanager
def interruptible_start() -> Iterator[None]:
    """Have Ctrl-C end the worker processes that the block starts, and then the block.

    They start for longer than anybody waits on a busy machine, and those that lost their parent
    meanwhile would end in tracebacks.

    Raises
    ------
    KeyboardInterrupt
        If there was one.
    """
    others = _worker_processes()

    def end() -> None:
        for process in _worker_processes() - others:
            with suppress(psutil.Error):
                process.kill()

    with _interrupts_held(end):
        yield


class Resources(ExitStack):
    """What is closed together; where a cluster of our own is among it, Ctrl-C hurries it.

    An interrupt out of the midst of closing would leave the cluster to Python's end, where Dask
    waits in vain for what it has begun before.

    Attributes
    ----------
    cluster : LocalCluster or None
        Its workers are killed by an interrupt, which is raised when all is closed.
    """

    cluster: LocalCluster | None = None

    def __exit__(self, *error: Any) -> None:
        if (cluster := self.cluster) is None:
            super().__exit__(*error)
            return
        with _interrupts_held(lambda: end_workers(cluster, [signal.SIGKILL])):
            super().__exit__(*error)

    def pop_all(self) -> Self:
        """Move all to a new stack."""
        moved = super().pop_all()
        moved.cluster, self.cluster = self.cluster, None
        return moved


@contextmanager
def _interrupts_held(end: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C ``end`` worker processes until the block has ended, and raise it then."""
    ours = current_thread() is main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # whoever ignores interrupts, or handles them otherwise, goes on doing so
        return
    held, over = Event(), Event()

    def end_all() -> None:
        while not over.wait(LOOK_S):
            end()

    def hold(*_: object) -> None:
        if not held.is_set():
            held.set()
            ending.start()

    ending = Thread(target=end_all, name="pipeinfer-interrupted", daemon=True)
    before = signal.signal(signal.SIGINT, hold)
    try:
        with unheard(held):
            yield
    except Exception:
        if not held.is_set():
            raise
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)
    if held.is_set():
        raise KeyboardInterrupt


def _worker_processes() -> set[psutil.Process]:
    """Return this program's processes that are workers, or that workers are forked from."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            command = " ".join(process.cmdline())
            if any(f"multiprocessing.{method}" in command for method in ("forkserver", "spawn")):
                found.add(process)
    return found


@contextmanager
def unheard(ending: Event) -> Iterator[None]:
    """Show nothing that Dask says in this process once workers are ``ending``, as they should."""

    def is_shown(_: logging.LogRecord) -> bool:
        return not ending.is_set()

    handlers = list(logging.getLogger("distributed").handlers)
    for handler in handlers:
        handler.addFilter(is_shown)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_shown)


def end_workers(
    cluster: LocalCluster, numbers: Sequence[int] = (signal.SIGTERM, signal.SIGCONT)
) -> None:
    """End the worker processes of a cluster that is about to be closed.

    They hold nothing of anybody's any more. Each that took its time would keep others waiting on
    a busy machine, and complain of a connection that it lost as it closed.

    Parameters
    ----------
    cluster : LocalCluster
    numbers : sequence of int
        Signals that each is sent: one that is stopped ends, too.
    """
    for nanny in list(cluster.workers.values()):
        if isinstance(nanny, Nanny):
            nanny.close_gracefully()  # or it would start another one
            for number in numbers:
                if (process := nanny.pid) is not None:
                    with suppress(ProcessLookupError):
                        os.kill(process, number)


ENDED_WITH_PYTHON = (AsyncProcess, ProcessInterface, ServerNode, WorkDir)
"""What Dask ends, or removes, as Python ends: worker processes, jobs, files, directories."""


def _leave_to_parent() -> None:
    """Have a process that was forked end nothing of its parent's as Python ends in it.

    Dask and multiprocessing take what they have begun for that of whichever process ends.
    """
    for cluster in SpecCluster._instances:
        cluster.shutdown_on_close = False
    for ending in list(finalize._registry):  # type: ignore[attr-defined]
        owner, _, arguments, _ = ending.peek() or (None, None, (), None)
        if isinstance(owner, ENDED_WITH_PYTHON):
            ending.detach()
        if isinstance(owner, AsyncProcess):
            multiprocessing.process._children.difference_update(arguments)  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_leave_to_parent)
