"""Where an engine runs: the caller's cluster, one of its own, or a loop in this process."""

from __future__ import annotations

import ast
import asyncio
import os
import sys
import warnings
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from inspect import currentframe
from ipaddress import ip_address
from math import inf
from multiprocessing import current_process
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any, Self, TypeVar

import dask
from dask.utils import parse_timedelta
from distributed import Client, LocalCluster, Security
from distributed.comm import get_address_host, parse_address, parse_host_port
from distributed.comm.registry import get_backend
from distributed.utils import get_mp_context

from pipeinfer_dask.runtime.links.reaching import reach
from pipeinfer_dask.runtime.planning.ending import end_workers, interruptible_start, unheard
from pipeinfer_dask.runtime.planning.gpus import CPUS, Devices, gpu_count
from pipeinfer_dask.runtime.planning.scheduler import NoSchedulerError, identity_of

T = TypeVar("T")


LOOP_END_S = 30.0
"""A loop that has not ended by then is left to itself; its thread does not keep a program alive."""


class LoopThread:
    """An event loop in a thread of its own, for an engine that has no client's."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, name="pipeinfer-head", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(LOOP_END_S)

    def _run(self) -> None:
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            self.loop.close()


CLEANUP_TIMEOUT_S = 30.0
"""How long an interrupted call waits for what it has begun to be taken back."""

GLANCE_S = 0.5
"""Who waits looks up so often: a signal that comes just before the thread sleeps wakes nobody."""


def check_apart(loop: asyncio.AbstractEventLoop) -> None:
    """Raise a RuntimeError in the thread of this loop: it can't wait for what it is to do."""
    try:
        ours = asyncio.get_running_loop()
    except RuntimeError:  # there is none in this thread
        return
    if ours is loop:
        raise RuntimeError(
            "expected a call from another thread than that of the engine's own event loop, which "
            "would wait for itself: call by asyncio.to_thread"
        )


def call_on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop of another thread, and wait for it.

    An interrupt cancels the coroutine, and waits until it has cleaned up.

    Raises
    ------
    CancelledError
        If the coroutine was cancelled.
    RuntimeError
        If the loop has ended, or it is this thread's own, which would wait for itself.
    """
    try:
        check_apart(loop)
    except RuntimeError:
        work.close()
        raise
    # `Future.result` is not safe to interrupt: the exception may leave the future's lock held,
    # on which the loop would then wait for ever, or come out as another one. A `SimpleQueue`
    # waits in one step, and holds nothing.
    begun: list[asyncio.Task[T]] = []
    ended: SimpleQueue[None] = SimpleQueue()

    def begin() -> None:
        begun.append(loop.create_task(work))
        begun[0].add_done_callback(lambda _: ended.put(None))

    def cancel() -> None:
        if not begun:  # nor will it be
            begin()
        begun[0].cancel()

    def wait(deadline: float = inf) -> None:
        while not (begun and begun[0].done()) and monotonic() < deadline:
            if loop.is_closed():
                raise RuntimeError("the event loop has ended")
            with suppress(Empty):
                ended.get(timeout=GLANCE_S)

    try:
        loop.call_soon_threadsafe(begin)
        wait()
    except BaseException:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(cancel)
            wait(monotonic() + CLEANUP_TIMEOUT_S)
        if not begun and loop.is_closed():
            work.close()  # nobody will begin it any more
        raise
    try:
        if begun[0].cancelled():
            raise CancelledError
        return begun[0].result()
    finally:
        begun.clear()  # or an error would hold itself, by the frame that it passed through


CONNECT_TIMEOUT_S = 10.0
"""How long to wait for a scheduler whose address somebody typed."""


def check_address(address: str) -> None:
    """Raise a ValueError unless this may be the address of a scheduler."""
    try:
        scheme, place = parse_address(address)
        get_backend(scheme)
        host, port = parse_host_port(place)
        if not host or not 0 < port < 65536:
            raise ValueError(f"no host or port in {place!r}")
    except ValueError as error:
        raise ValueError(
            f"expected --scheduler as an address like tcp://host:8786, got {address!r}: {error}"
        ) from error


def connected(address: str) -> Client:
    """Return a client of the cluster whose scheduler has this address.

    Raises
    ------
    ValueError
        If this is no address, or nobody answers there.
    """
    check_address(address)
    secured = Security().get_connection_args("client")["ssl_context"] is not None
    if parse_address(address)[0] in ("tls", "wss") and not secured:
        raise ValueError(
            f"expected certificates of Dask's for {address}, got none: name them in its "
            "configuration, as distributed.comm.tls"
        )
    configured = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"))
    seconds = min(CONNECT_TIMEOUT_S, configured)
    try:
        # A client that finds nobody goes on trying while it is thrown away: first a look.
        asyncio.run(_answers(address, seconds))
        return Client(address, timeout=seconds, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected --scheduler as the address of a running Dask scheduler, such as "
            f"tcp://host:8786, got {address!r}, where none answers within {seconds:g} s: {error}"
        ) from error


async def _answers(address: str, seconds: float) -> None:
    comm = await reach(address, seconds, **Security().get_connection_args("client"))
    await comm.close()


def loop_of(client: Client) -> asyncio.AbstractEventLoop:
    """Return the loop that the client runs on."""

    async def running() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    loop: asyncio.AbstractEventLoop = client.sync(running)
    return loop


PROTOCOLS = ("tcp://", "tls://", "inproc://")
"""Below these a link can carry bytes that Dask does not look into."""


def workers_of(client: Client) -> dict[str, int]:
    """Return address and threads of each worker.

    Warns if other machines can reach the workers without TLS.

    Raises
    ------
    ValueError
        If the client is closed, or links could not do without pickles.
    NoSchedulerError
        If the scheduler does not answer.
    """
    if client.status != "running":
        raise ValueError(
            f"expected a client that is connected to a cluster, got one that is {client.status}: "
            f"make another one"
        )
    known = call_on(loop_of(client), identity_of(client))
    workers = known["workers"]
    for address in workers:
        if not address.startswith(PROTOCOLS):
            raise ValueError(
                f"expected workers that listen on tcp, tls or inproc, got {address}: over anything "
                f"else Dask unpickles what comes, so start scheduler and workers with another "
                f"--protocol"
            )
    if exposed := [address for address in (*workers, known["address"]) if _is_exposed(address)]:
        # Python shows a warning of the same text and place once.
        warnings.warn(
            f"other machines can reach this cluster, such as {exposed[0]}, without TLS: "
            "who can connect can run code there, and read what is generated. Give scheduler, "
            "workers and client a distributed.Security, or have them listen on 127.0.0.1",
            stacklevel=4,
        )
    return {address: int(info["nthreads"]) for address, info in workers.items()}


def names_of(client: Client) -> dict[str, str]:
    """Return machine and name of each worker that the scheduler knows, by its address."""
    try:
        workers = call_on(loop_of(client), identity_of(client))["workers"]
    except NoSchedulerError:
        return {}  # they go by their addresses
    return {address: f"{info['host']}, worker {info['name']}" for address, info in workers.items()}


def _is_exposed(address: str) -> bool:
    """Whether somebody listens where others than this machine can hear it, and understand."""
    if address.startswith(("inproc://", "tls://")):
        return False
    host = get_address_host(address)
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def _check_script() -> None:
    """Refuse a script that each worker process would run again when it imports it, or can't.

    Raises
    ------
    RuntimeError
        If it has no main guard before it comes here, is in no file, or is being imported by a
        process that it has started.
    """
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    importing = getattr(current_process(), "_inheriting", False)  # so multiprocessing tells
    guard = (
        f'expected `if __name__ == "__main__":` in {"the script" if importing else script}: '
        "worker processes import the script again, so put what it does behind that line"
    )
    if importing:
        raise RuntimeError(guard)
    if not hasattr(main, "__spec__"):  # IPython's %reset takes it, and multiprocessing reads it
        main.__spec__ = None
    module = getattr(main.__spec__, "name", "")
    if script is None or module.rpartition(".")[2] == "__main__":
        return  # nothing that workers import: a notebook, `python -c`, an archive, a package
    try:
        guards = _comparisons_of_name(Path(script).read_text(errors="replace"))
    except FileNotFoundError:
        raise RuntimeError(
            f"expected a script in a file, which worker processes import again, got {script}: "
            "save it as one, or use in_process=True"
        ) from None
    except (OSError, SyntaxError, ValueError):  # not Python's, as IPython's own scripts
        return
    frame, line = currentframe(), inf
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals is vars(main):
            line = frame.f_lineno
        frame = frame.f_back
    if not any(at <= line for at in guards):
        raise RuntimeError(guard)


def _comparisons_of_name(source: str) -> list[int]:
    """Return the lines in which a script compares its ``__name__``."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if "__name__" in names:
                lines.append(node.lineno)
    return lines


PATIENCE = {"distributed.deploy.lost-worker-timeout": "1 hour"}
"""Dask gives a nanny up whose worker is not back by then, for good. By default after 15 seconds,
which a busy machine needs to start one."""


class _Settings:
    """Settings of Dask, which are the whole process's, and stay while a cluster of ours needs them.

    Whichever ends first: the settings of before are back once the last one has ended.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._held = 0
        self._before = ExitStack()

    @contextmanager
    def hold(self, settings: Mapping[str, str]) -> Iterator[None]:
        with self._lock:
            self._before.enter_context(dask.config.set(settings))
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1
                if not self._held:
                    self._before.close()


_SETTINGS = _Settings()


def keep_nannies(client: Client, resources: ExitStack) -> None:
    """Have nannies of this process, if the client's are, bring workers back however long it takes.

    A queue's jobs are no nannies: they don't come back, and Dask asks for others in their place.
    """
    if isinstance(client.cluster, LocalCluster):
        resources.enter_context(_SETTINGS.hold(PATIENCE))


def own_cluster(
    count: int,
    resources: ExitStack,
    devices: Devices = CPUS,
    *,
    spares: int = 0,
    memory_limit: str | int = 0,
) -> Client:
    """Start ``count`` worker processes on this machine, to be ended with ``resources``.

    There are ``spares`` more, which idle until one of the others is lost.

    Where each worker is to use its own GPU, and dask-cuda is there to give it one, they are no
    more than there are GPUs.
    """
    _check_script()
    kind: type[LocalCluster] = LocalCluster
    # Importing torch and transformers takes seconds of a core in every process. With a fork
    # server one process does it, and the workers are forks of that one. What has been forked
    # can't use a GPU that its parent may have touched, though.
    method = "spawn" if devices.on_gpus else "forkserver"
    if devices.own_gpus and find_spec("dask_cuda") is not None:
        kind = import_module("dask_cuda").LocalCUDACluster
        count = min(count, gpu_count())
    # Read whenever a worker is lost, or restarted.
    settings = {"distributed.worker.multiprocessing-method": method, **PATIENCE}
    resources.enter_context(_SETTINGS.hold(settings))
    ending = Event()
    resources.enter_context(unheard(ending))
    with interruptible_start():
        get_mp_context().set_forkserver_preload(
            ["pipeinfer_dask.runtime.nodes.apart", "distributed", "pipeinfer_dask.models.shard"]
        )
        cluster = resources.enter_context(
            kind(
                n_workers=count + spares,
                threads_per_worker=max(1, (os.cpu_count() or 1) // count),
                processes=True,
                memory_limit=memory_limit,
                # None would mean port 8787, which may be taken.
                dashboard_address="127.0.0.1:0",
            )
        )
    if method == "forkserver":  # what was spawned may hold what only it can give back
        resources.callback(end_workers, cluster)
        resources.callback(ending.set)
    client: Client = resources.enter_context(Client(cluster, set_as_default=False))
    return client
