"""The way from a cluster to an engine: jobs submitted, workers waited for, lost jobs replaced."""

from __future__ import annotations

import asyncio
import os
import platform
from contextlib import ExitStack, suppress
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed import Client
from distributed.deploy import Cluster

from pipeinfer_dask.drafting.ngram import NGRAM
from pipeinfer_dask.engine import Engine
from pipeinfer_dask.hpc import waiting
from pipeinfer_dask.hpc.jobs import Jobs, SubmitError, ages_of, check_runtime
from pipeinfer_dask.hpc.keeping import Keeper
from pipeinfer_dask.hpc.queues import JobState
from pipeinfer_dask.hpc.scaling import Floor
from pipeinfer_dask.hpc.waiting import JobError, Progress, StartTimeoutError
from pipeinfer_dask.models.checkpoint import check_pair, open_checkpoint
from pipeinfer_dask.models.layers import split_layers
from pipeinfer_dask.runtime.nodes import loading
from pipeinfer_dask.runtime.planning.clusters import call_on, loop_of
from pipeinfer_dask.runtime.planning.opening import check_names
from pipeinfer_dask.runtime.planning.scheduler import NoSchedulerError, known_workers
from pipeinfer_dask.trace.picture import table_html

NAMES_S = 5.0
"""Machines that have not told their names for so long go by their addresses."""


class ClusterEngine(Engine):
    """An engine that knows where its nodes are. Made by `engine_from`.

    Closing it leaves jobs alone: the cluster's end cancels them.
    """

    _client: Client
    _keeper: Keeper | None

    @property
    def lacking(self) -> tuple[JobState, ...]:
        """What the queue last said of jobs that have no worker, such as one for a lost node.

        Of those that it has refused, too: as ``refused``, with its own words.
        """
        return self._keeper.lacking if self._keeper is not None else ()

    @property
    def nodes(self) -> dict[str, str]:
        """By node, such as ``stage 0 (layers 0 to 9)``, the machine and worker that hold it.

        The ``head`` is the ``client`` itself, unless a worker drives the pipeline.
        """
        places = sorted(self._places.items())
        if self._client.status != "running":
            return dict(places)
        self._names = _names(self._client)
        return {node: self._names.get(where, where) for node, where in places}

    def _repr_html_(self) -> str:
        return table_html([repr(self), ""], list(self.nodes.items()))


def engine_from(
    cluster: Cluster | Client,
    target: str | os.PathLike[str],
    draft: str | os.PathLike[str] | None = None,
    *,
    stages: int,
    spares: int | None = None,
    start_timeout: str | float | None = None,
    least_runtime: str | float | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> ClusterEngine:
    """Open an engine on a cluster whose workers may not be there yet.

    Jobs are submitted where the cluster is one of dask-jobqueue, and while the engine is open
    a job that is lost is replaced. Of other clusters the workers are only waited for: of
    dask-ssh, of dask-mpi, or of a scheduler that runs somewhere. A cluster that scales
    itself leaves alone what holds a node of the engine, and has no fewer workers than that
    needs until it is closed.

    Parameters
    ----------
    cluster : Cluster or Client
        Such as one made by `job_cluster`. It is not closed with the engine.
    target, draft : str or path
        As for `Engine.from_pretrained`.
    stages : int
        Stages of the pipeline: each gets a worker, and so does a draft model.
    spares : int, optional
        Workers beyond these, which wait for a node that is lost; by default
        ``pipeinfer.hpc.spares``. Without one, it waits for the job that is submitted in place
        of its own, and after ``pipeinfer.hpc.move-in-after`` moves in with another node that
        has room, if one has.
    start_timeout : str or float, optional
        How long to wait for the workers, such as ``"2 hours"``; seconds where it is a number.
        By default ``pipeinfer.hpc.start-timeout``.
    least_runtime : str or float, optional
        What each job must have left of its walltime when all have started; by default
        ``pipeinfer.hpc.least-runtime``.
    progress : callable or bool, optional
        Told of each step as a `Waiting`, and then as a `Loading`. True shows bars, False
        none; by default notebooks show them.
    **options
        Whatever else `Engine.from_pretrained` takes. With ``layer_split="auto"`` nodes that
        differ get what each can hold and compute.

    Returns
    -------
    ClusterEngine
        An `Engine`; closing it lets go of the workers, and leaves the cluster as it is.

    Raises
    ------
    JobError
        If the queue refuses a job, or a job ends before its worker came: a `RuntimeError`.
    StartTimeoutError
        If the workers do not come in time: a `TimeoutError`. Jobs stay in the queue, unless
        the cluster scales itself.
    RuntimeError
        If the cluster's scheduler ends meanwhile, or hangs.
    ValueError
        If the jobs' walltime is too short, or as `Engine.from_pretrained`: what can be checked
        without workers is checked before a job is submitted.
    """
    check_names(ClusterEngine.from_pretrained, options)
    _check_count("stages", stages, 1)
    spares = dask.config.get("pipeinfer.hpc.spares") if spares is None else spares
    _check_count("spares", spares, 0)
    timeout = _seconds("start-timeout", start_timeout)
    least = _seconds("least-runtime", least_runtime)
    wanted = stages + spares + _check_models(target, draft, stages, options.get("layer_split"))
    jobs = Jobs.of(cluster)
    walltime = jobs.walltime() if jobs is not None else None
    if walltime is not None:
        check_runtime(walltime, least, {})
    with ExitStack() as resources:
        client = cluster
        if isinstance(cluster, Cluster):
            client = resources.enter_context(Client(cluster, set_as_default=False))
        if not isinstance(client, Client) or client.asynchronous:
            raise ValueError(
                f"expected a cluster or a client made with asynchronous=False, got {cluster!r}"
            )
        floor = Floor(client.cluster, wanted)
        resources.callback(floor.release)
        with waiting.shown(progress) as told:
            try:
                call_on(loop_of(client), _workers(client, jobs, floor, timeout, told))
            except SubmitError as refused:
                raise JobError(
                    f"expected the queue to take a job, but it says: {refused}"
                ) from None
        if walltime is not None:
            check_runtime(walltime, least, ages_of(client))
        keeper = _keep_jobs(client, jobs, floor, resources) if jobs is not None else None
        with loading.shown(progress) as tell:
            engine = ClusterEngine.from_pretrained(
                target,
                draft,
                client=client,
                stages=stages,
                spares=spares,
                progress=tell if tell is not None else False,
                **{"move_in_after": _seconds("move-in-after", None)} | options,
            )
        engine._client = client
        engine._keeper = keeper
        engine._names = _names(client)
        # Below all else that the engine has: a client of ours is closed last.
        above = engine._resources.pop_all()
        engine._resources.enter_context(resources.pop_all())
        engine._resources.enter_context(above)
    return engine


def _names(client: Client) -> dict[str, str]:
    """Return machine and name of each worker, by its address."""
    try:
        machines: dict[str, str] = client.run(
            platform.node, on_error="ignore", callback_timeout=NAMES_S
        )
        workers = call_on(loop_of(client), known_workers(client))
    except (OSError, NoSchedulerError):
        return {}  # one of them is lost, maybe, and nobody has noticed yet
    return {
        address: f"{machine}, worker {workers[address]['name']}"
        for address, machine in machines.items()
        if address in workers
    }


def _check_count(name: str, given: Any, least: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise ValueError(f"expected {name} to be a whole number from {least} on, got {given!r}")


def _seconds(key: str, given: str | float | None) -> float:
    value = dask.config.get(f"pipeinfer.hpc.{key}") if given is None else given
    try:
        return float(parse_timedelta(value))
    except (KeyError, ValueError, TypeError, AttributeError):
        raise ValueError(
            f"expected {key} as a time such as '10 minutes' or as seconds, got {value!r}"
        ) from None


def _check_models(
    target: str | os.PathLike[str], draft: str | os.PathLike[str] | None, stages: int, split: Any
) -> bool:
    """Check what needs no workers, before anybody waits for them; say if the draft needs one."""
    opened = open_checkpoint(os.fspath(target), elsewhere=True)
    split_layers(opened.num_layers, stages, None if split == "auto" else split)
    if draft is None or draft == NGRAM:
        return False
    check_pair(opened, open_checkpoint(os.fspath(draft), elsewhere=True))
    return True


async def _workers(
    client: Client, jobs: Jobs | None, floor: Floor, patience: float, told: Any
) -> None:
    wanted = floor.workers
    floor.hold()  # first, or what is submitted now could be cancelled at once
    if jobs is not None:
        try:
            await jobs.submit(wanted, patience)
        except TimeoutError:
            raise StartTimeoutError(
                f"expected the queue to take {wanted} jobs within {patience:g} s, got no answer: "
                "see how it is, or allow more time by start_timeout"
            ) from None
    await waiting.wait_for_workers(client, wanted, patience, jobs, told, floor.scales)


def _keep_jobs(client: Client, jobs: Jobs, floor: Floor, resources: ExitStack) -> Keeper:
    """Replace lost jobs until ``resources`` are closed."""
    loop = loop_of(client)
    keeper = Keeper(jobs, _seconds("replace-after", None), floor)

    async def begin() -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(keeper.keep())

    keeping = call_on(loop, begin())

    def end() -> None:
        with suppress(RuntimeError):  # the loop may have ended, with the cluster
            loop.call_soon_threadsafe(keeping.cancel)

    resources.callback(end)
    return keeper
