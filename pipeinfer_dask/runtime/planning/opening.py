"""What an engine is asked to open: checked as far as that needs no look at anything, and opened."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any, ParamSpec, Protocol, TypeVar

from distributed import Client

from pipeinfer_dask.drafting.ngram import NGRAM
from pipeinfer_dask.models.linears import check_weights
from pipeinfer_dask.runtime.planning.clusters import call_on
from pipeinfer_dask.runtime.planning.memory import MOST_CONCURRENT
from pipeinfer_dask.runtime.planning.placement import CLIENT, WORKER


class Closable(Protocol):
    """What is to be closed on the loop that it lives on."""

    async def close(self) -> None:
        """Release all that it has."""
        ...


T = TypeVar("T", bound=Closable)
P = ParamSpec("P")
R = TypeVar("R")


def check_names(call: Callable[..., object], given: Iterable[str]) -> None:
    """Raise a ValueError unless the call takes arguments of all these names."""
    known = [name for name in signature(call).parameters if name not in ("cls", "self")]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise ValueError(f"there is no setting {name!r}: {hint}")


def explained(method: Callable[P, R]) -> Callable[P, R]:
    """Have a method say what it takes, in words of its user, when it is given something else."""
    expected = signature(method)
    _, *taken = expected.parameters.values()
    first = [one.name for one in taken if one.kind is one.POSITIONAL_OR_KEYWORD]
    named = [one.name for one in taken if one.kind is one.KEYWORD_ONLY]

    @wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            expected.bind(*args, **kwargs)
        except TypeError as error:
            if taken[-1].kind is not taken[-1].VAR_KEYWORD:
                check_names(method, kwargs)
            raise TypeError(
                f"expected {method.__name__}({', '.join(first)}) and all else by name, such as "
                f"{named[0]}=...: {error}"
            ) from None
        return method(*args, **kwargs)

    return checked


def check_asked(
    models: tuple[object, ...],
    client: Any,
    in_process: bool,
    stages: object,
    layer_split: object,
    weights: object,
    progress: object,
    head: object,
) -> None:
    """Check what a user gives to `Engine.from_pretrained`, by kind.

    Raises
    ------
    ValueError
        If anything is of a wrong kind.
    """
    if client is not None and in_process:
        raise ValueError("expected a client or in_process=True, got both: leave one out")
    is_place = head in (CLIENT, WORKER) or (isinstance(head, str) and "://" in head)
    if not isinstance(head, str) or (in_process and not is_place):
        raise ValueError(
            f"expected head as 'client', 'worker' or the address of a worker, got {head!r}"
        )
    if in_process and head != CLIENT:
        raise ValueError(f"expected in_process=True or head={head!r}, got both: leave one out")
    if client is None and head not in (CLIENT, WORKER):
        raise ValueError(
            f"expected head as 'client' or 'worker' where the engine brings its own workers, got "
            f"{head!r}: give the client of the cluster that has this worker, too"
        )
    if client is not None and not isinstance(client, Client):
        raise ValueError(
            f"expected a distributed.Client, got {client!r}: make one with Client(...)"
        )
    if client is not None and client.asynchronous:
        raise ValueError(
            "expected a client made with asynchronous=False: this engine's calls block "
            "(its generations can be awaited all the same)"
        )
    check_count("stages", stages)
    numbers = isinstance(layer_split, Sequence) and not isinstance(layer_split, (str, bytes))
    is_auto = isinstance(layer_split, str) and layer_split == "auto"
    if layer_split is not None and not is_auto and not (numbers and layer_split):
        raise ValueError(
            f"expected layer_split as numbers, one a stage, or as 'auto', got {layer_split!r}"
        )
    check_weights(weights)
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise ValueError(f"expected progress as a callable, True, False or None, got {progress!r}")
    for draft in models[1:]:
        slip = isinstance(draft, str) and draft != NGRAM and not Path(draft).exists()
        if slip and get_close_matches(str(draft), [NGRAM], cutoff=0.8):
            raise ValueError(f"there is no draft {draft!r}: did you mean {NGRAM!r}?")
    for model in models:
        if isinstance(model, tuple):
            raise ValueError(
                f"expected a model's directory or hub name, got {model!r}: give the models of a "
                "pair one by one, as from_pretrained(pair.target, draft=pair.draft)"
            )
        if not isinstance(model, (str, os.PathLike)):
            raise ValueError(f"expected a model's directory or hub name, got {model!r}")


def check_recovery(
    spares: object,
    max_recoveries: object,
    recovery_timeout: Any,
    node_timeout: Any,
    move_in_after: Any,
) -> None:
    """Check what a user says of losses.

    Raises
    ------
    ValueError
        If anything is out of range.
    """
    for name, count in (("spares", spares), ("max_recoveries", max_recoveries)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"expected {name} as a whole number of at least 0, got {count!r}")
    for name, seconds in (("recovery_timeout", recovery_timeout), ("node_timeout", node_timeout)):
        if not (_is_number(seconds) and seconds > 0):
            raise ValueError(f"expected {name} as seconds above 0, got {seconds!r}")
    if not (_is_number(move_in_after) and move_in_after >= 0):
        raise ValueError(f"expected move_in_after as seconds from 0 on, got {move_in_after!r}")


def check_room(max_concurrent: Any, spares: object, *, in_process: bool) -> None:
    """Check, of checked spares, how many generations and workers there are to be.

    Raises
    ------
    ValueError
        If there is no such engine.
    """
    check_count("max_concurrent", max_concurrent)
    if max_concurrent is not None and max_concurrent > MOST_CONCURRENT:
        raise ValueError(
            f"expected max_concurrent as a whole number from 1 to {MOST_CONCURRENT}, got "
            f"{max_concurrent}: others wait in a queue"
        )
    if in_process and spares:
        raise ValueError(
            f"expected spares with workers, got {spares} and in_process=True: leave one out"
        )


def _is_number(given: Any) -> bool:
    # What is longer no thread can wait for; nan and infinity are no times, either.
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    return number and abs(given) <= TIMEOUT_MAX


def open_on(
    loop: asyncio.AbstractEventLoop,
    opening: Callable[[], Coroutine[Any, Any, T]],
    resources: ExitStack,
) -> T:
    """Open a pipeline or a head on a loop of another thread, to be closed with ``resources``."""
    # Noted on the loop itself: an interrupt may come before we hear of it.
    opened: list[T] = []

    async def note() -> None:
        opened.append(await opening())

    def close() -> None:
        # The loop ends with the client: then its links are closed, and the workers know.
        with suppress(RuntimeError, CancelledError):
            while opened and loop.is_running():
                call_on(loop, opened.pop().close())

    resources.callback(close)
    call_on(loop, note())
    return opened[0]


def check_count(name: str, count: object) -> None:
    """Raise a ValueError unless this is a whole number of at least 1, or nothing."""
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"expected {name} as a whole number of at least 1, got {count!r}")
