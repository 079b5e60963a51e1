"""Faults, done to the real processes of a cluster: killed, stopped, cut off, held up.

Nothing here is known to the engine: a saboteur looks at the workers from outside, or works
within them as a broken machine or network would.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from distributed import Client, Scheduler, Worker
from distributed.core import ConnectionPool

STUCK_S = 20.0
"""A compute thread that is made to hang does so for so long."""
LATE_S, LATE_RUNS = 0.05, 20
"""A message that is made to come late does so by so much, and so many in a row do."""
PIECE = 2**26
"""Bytes that are taken at once where memory is to run short."""
BUSY_S = 1.0
"""A worker that is made busy does nothing for others for so long, but by chance."""
PATIENCE_S = 20.0
"""How long to look for a node that nobody has found: one that is lost comes back elsewhere."""
LOOK_S = 0.02
DRAFTER = "drafter"


class Saboteur:
    """Does harm to the nodes of the one engine on a cluster.

    A node's messages are those of a stage to the next one, or of the last stage to the client;
    and all that the drafter says, pongs too.

    Parameters
    ----------
    client : Client
        Of a cluster whose workers are processes of this machine.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stopped: set[str] = set()

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def places(self) -> dict[str, str]:
        """Return each node's worker, by the node's name: ``stage-0``, ``drafter``."""
        found: dict[str, tuple[int, str]] = {}
        for worker, keys in self._ask(_nodes).items():
            for key in keys:
                _, _, generation, name = key.split("-", 3)
                found[name] = max(found.get(name, (-1, "")), (int(generation), worker))
        return {name: worker for name, (_, worker) in sorted(found.items())}

    def kill(self, *nodes: str) -> None:
        """End nodes' processes at once (SIGKILL)."""
        for process in {self._pid(self._place(node)) for node in nodes}:
            os.kill(process, signal.SIGKILL)

    def die(self, node: str) -> None:
        """End a node's process, as `kill` does, as soon as it computes something."""
        self._within(node, _die)

    @contextmanager
    def stopped(self, node: str) -> Iterator[None]:
        """Stop a node's process (SIGSTOP) for as long as the block takes."""
        worker = self._place(node)
        process = self._pid(worker)
        self._stopped.add(worker)
        os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process, signal.SIGCONT)
            self._stopped.discard(worker)

    def cut(self, node: str) -> None:
        """Cut all data links of a stage, or the one link of the drafter."""
        self._within(node, _cut)

    def hold_up(self, node: str) -> None:
        """Have the next that a node computes come late, and in order."""
        self._within(node, _hold_up)

    def drop(self, node: str) -> None:
        """Have a node's next message vanish."""
        self._within(node, _drop)

    def repeat(self, node: str) -> None:
        """Have a node's next message come twice."""
        self._within(node, _repeat)

    def swap(self, node: str) -> None:
        """Have a node's next two messages come in the wrong order."""
        self._within(node, _swap)

    def swallow(self, node: str) -> None:
        """Have all of a node's messages vanish, on a link that stays open."""
        self._within(node, _swallow)

    def hang(self, node: str) -> None:
        """Have a node's compute thread hang, while its process is well."""
        self._within(node, _hang)

    def busy(self, node: str) -> None:
        """Have a thread of a node's process compute in Python for a while, beside all else."""
        self._within(node, _busy)

    def squeeze(self, node: str) -> None:
        """Have a node's process take memory, up to where its nanny ends it.

        Only where workers have a memory limit.
        """
        self._within(node, _squeeze)

    def left(self) -> dict[str, dict[str, int]]:
        """Return how much the workers hold for engines, by worker; nothing that is zero."""
        return {worker: held for worker, held in self._ask(_held).items() if held}

    def files(self) -> dict[str, int]:
        """Return how many descriptors each worker has open.

        Without the connections that Dask's pools hold, which come with the first heartbeat, or
        where two ask at once. A worker that no engine uses has as many as another one: see that
        it has been used once.
        """
        files = self._ask(_files)
        pooled: dict[str, int] = self._client.run_on_scheduler(_pooled_by_scheduler)
        return {worker: count - pooled.get(worker, 0) for worker, count in files.items()}

    def _within(self, node: str, harm: Callable[..., None]) -> None:
        self._client.run(harm, node, workers=[self._place(node)])

    def _place(self, node: str) -> str:
        """Return a node's worker, or wait for it: it may just be on its way to another one."""
        deadline = time.monotonic() + PATIENCE_S
        while (worker := self.places().get(node)) is None:
            if time.monotonic() > deadline:
                raise ValueError(f"expected one of {', '.join(self.places())}, got {node}")
            time.sleep(LOOK_S)
        return worker

    def _pid(self, worker: str) -> int:
        pid: int = self._client.run(os.getpid, workers=[worker])[worker]
        return pid

    def _ask(self, question: Callable[..., Any]) -> dict[str, Any]:
        """Ask all workers that can answer; some may die meanwhile."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        awake = [worker for worker in workers if worker not in self._stopped]
        answers = self._client.run(question, workers=awake, on_error="return")
        for answer in answers.values():
            if isinstance(answer, Exception) and not isinstance(answer, OSError):
                raise answer
        return {w: answer for w, answer in answers.items() if not isinstance(answer, OSError)}


# --- run on the workers ---------------------------------------------------------------


def _nodes(dask_worker: Worker) -> list[str]:
    return [name for name in dask_worker.handlers if name.startswith("pipeinfer-")]


def _node(dask_worker: Worker, name: str) -> Any:
    actors: dict[str, Any] = {str(key): a for key, a in dask_worker.state.actors.items()}
    key = max(key for key in actors if key.endswith(f"-{name}"))
    return actors[key]._node


def _die(name: str, dask_worker: Worker) -> None:
    def dying(model: Any, job: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    _node(dask_worker, name).thread._compute = dying


def _cut(name: str, dask_worker: Worker) -> None:
    node = _node(dask_worker, name)
    for link in node._links:
        if link is not node._control or name == DRAFTER:
            link.abort()


def _hold_up(name: str, dask_worker: Worker) -> None:
    thread = _node(dask_worker, name).thread
    deliver = thread._deliver
    to_come = LATE_RUNS

    def later(job: Any) -> None:
        nonlocal to_come
        to_come -= 1
        if not to_come:
            thread._deliver = deliver
        time.sleep(LATE_S)
        deliver(job)

    thread._deliver = later


def _outgoing(name: str, dask_worker: Worker) -> tuple[Any, str]:
    """Return the carrier of what a node says, and its method: a drafter has one link for all."""
    node = _node(dask_worker, name)
    if name == DRAFTER:
        return node._control._carrier, "write"
    return node._next._carrier, "write_from_thread"


def _swap(name: str, dask_worker: Worker) -> None:
    carrier, method = _outgoing(name, dask_worker)
    write = getattr(carrier, method)
    held: list[Any] = []

    def swapped(frames: Any) -> None:
        if not held:
            held.append(frames)
            return
        setattr(carrier, method, write)
        write(frames)
        write(held.pop())

    setattr(carrier, method, swapped)


def _drop(name: str, dask_worker: Worker) -> None:
    carrier, method = _outgoing(name, dask_worker)
    write = getattr(carrier, method)
    setattr(carrier, method, lambda frames: setattr(carrier, method, write))


def _repeat(name: str, dask_worker: Worker) -> None:
    carrier, method = _outgoing(name, dask_worker)
    write = getattr(carrier, method)

    def repeated(frames: Any) -> None:
        setattr(carrier, method, write)
        write(frames)
        write(frames)

    setattr(carrier, method, repeated)


def _swallow(name: str, dask_worker: Worker) -> None:
    carrier, method = _outgoing(name, dask_worker)
    setattr(carrier, method, lambda frames: None)


def _hang(name: str, dask_worker: Worker) -> None:
    thread = _node(dask_worker, name).thread
    compute = thread._compute

    def hanging(model: Any, job: Any) -> None:
        thread._compute = compute
        threading.Event().wait(STUCK_S)
        compute(model, job)

    thread._compute = hanging


def _busy(name: str) -> None:
    def compute() -> None:
        ends = time.monotonic() + BUSY_S
        while time.monotonic() < ends:
            pass

    threading.Thread(target=compute, daemon=True).start()


def _squeeze(name: str, dask_worker: Worker) -> None:
    limit = dask_worker.memory_manager.memory_limit
    if not limit:
        raise ValueError(f"expected a worker with a memory limit, got {dask_worker.address}")

    def take() -> None:
        taken = [b"." * PIECE for _ in range(0, limit, PIECE)]
        threading.Event().wait(STUCK_S)
        del taken

    threading.Thread(target=take, daemon=True).start()


def _held(dask_worker: Worker) -> dict[str, int]:
    held = {
        "actors": len(dask_worker.state.actors),
        "nodes": len(_nodes(dask_worker)),
        "threads": sum(t.name.startswith("pipeinfer") for t in threading.enumerate()),
        "shared memory": len(shared_memory()),
    }
    return {what: count for what, count in held.items() if count}


def _files(dask_worker: Worker) -> int:
    return psutil.Process().num_fds() - sum(_pooled(dask_worker.rpc).values())


def _pooled_by_scheduler(dask_scheduler: Scheduler) -> dict[str, int]:
    return _pooled(dask_scheduler.rpc)


def _pooled(pool: ConnectionPool) -> dict[str, int]:
    """Return how many sockets a pool of Dask's holds open, by what they lead to."""
    sides = (pool.available, pool.occupied)
    comms = [(peer, comm) for side in sides for peer in [*side] for comm in [*side[peer]]]
    sockets = [p for p, comm in comms if not p.startswith("inproc:") and not comm.closed()]
    return dict(Counter(sockets))


def shared_memory() -> list[str]:
    """Return what this process has mapped of /dev/shm, but for the locks of multiprocessing."""
    paths = [Path(mapped.path) for mapped in psutil.Process().memory_maps()]
    there = [path for path in paths if path.is_relative_to("/dev/shm")]
    return [str(path) for path in there if not path.name.startswith("sem.")]
