"""Threads that share a computation with the one that asks for it.

A product may take no more than a tenth of a millisecond, and an executor 30 to 50 us to hand one
over. A queue there and one back take 20 at most.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")
Replies = SimpleQueue[tuple[int, Any, Exception | None]]
Tasks = SimpleQueue[tuple[int, Callable[[], Any], Replies] | None]


class Helpers:
    """Threads beside the calling one, which end with this.

    Parameters
    ----------
    threads : int
        How many they are together.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._tasks: Tasks = SimpleQueue()
        for number in range(1, threads):
            # A process need not wait for them to end.
            Thread(target=_help, args=(self._tasks,), name=f"helper-{number}", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None)

    def call(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Call functions at once, the last of them here, and return their results in order.

        Raises
        ------
        Exception
            That of a function.
        """
        *others, mine = functions
        replies: Replies = SimpleQueue()
        for number, function in enumerate(others):
            self._tasks.put((number, function, replies))
        results: list[Any] = [None] * len(others) + [mine()]
        for _ in others:
            number, result, error = replies.get()
            if error is not None:
                raise error
            results[number] = result
        return results


def _help(tasks: Tasks) -> None:
    while (task := tasks.get()) is not None:
        number, function, replies = task
        try:
            replies.put((number, function(), None))
        except Exception as error:
            replies.put((number, None, error))
        # What came of it is not this thread's while it waits.
        del task, function, replies
