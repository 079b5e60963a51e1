"""Clusters of jobs that suit pinned stages: one worker a job, without a limit that kills it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import parse_timedelta

from pipeinfer_dask.hpc.queues import SYSTEMS

if TYPE_CHECKING:
    from dask_jobqueue import JobQueueCluster

PRELOAD = "pipeinfer_dask.runtime.nodes.actors"
"""What every worker needs, and takes seconds to import."""


def job_cluster(
    system: str,
    *,
    cores: int | None = None,
    memory: str | None = None,
    walltime: str | None = None,
    interface: str | None = None,
    local_directory: str | None = None,
    death_timeout: str | float | None = None,
    worker_extra_args: Sequence[str] = (),
    exclusive: bool | None = None,
    **options: Any,
) -> JobQueueCluster:
    """Make a cluster of dask-jobqueue whose jobs suit the stages of a pipeline.

    It submits nothing yet: `engine_from` does, as many jobs as it needs. ``job_script()``
    shows what a job will be. What is not given comes from dask-jobqueue's own
    configuration (``jobqueue.slurm`` and so on).

    Parameters
    ----------
    system : {"slurm", "pbs", "sge", "lsf", "htcondor", "oar"}
        The queueing system.
    cores : int, optional
        Cores of a job, which all work for its one stage.
    memory : str, optional
        Memory to ask the queue for, such as ``"64 GB"``: weights, caches, and 1 GB for Python.
        The worker itself has no limit below that: a model can't be spilled to disk, and a
        worker at its limit would be stopped.
    walltime : str, optional
        As the queueing system writes it: ``"02:00:00"``, LSF ``"02:00"``. It ends the job,
        whatever the engine is doing.
    interface : str, optional
        The network to use, such as ``"ib0"``, for scheduler and workers.
    local_directory : str, optional
        Where workers keep their files: a disk of the node's own is best.
    death_timeout : str or float, optional
        A worker that finds no scheduler for so long gives its job back; by default
        ``pipeinfer.hpc.death-timeout``.
    worker_extra_args : sequence of str
        More arguments for ``dask worker``.
    exclusive : bool, optional
        Whether a job has its node to itself: stages that share one take memory and cores from one
        another. By default ``pipeinfer.hpc.exclusive``, which is true, where Slurm, PBS, LSF or
        OAR can be asked for it. Directives of yours that say how a job is placed come first.
    **options
        Whatever else the class takes, such as ``queue``, ``account``, ``security``,
        ``job_extra_directives``, ``job_script_prologue`` or ``log_directory``.

    Returns
    -------
    JobQueueCluster
        For a ``with`` block, which cancels all jobs at its end.

    Raises
    ------
    ImportError
        If dask-jobqueue is not installed.
    ValueError
        If there is no such system, or the options do not fit.
    """
    if system not in SYSTEMS:
        raise ValueError(f"expected a queueing system of {', '.join(SYSTEMS)}, got {system!r}")
    if walltime is not None:
        SYSTEMS[system].seconds_of(walltime)
    for name in ("processes", "n_workers"):
        if name in options:
            raise ValueError(
                f"expected no {name}, got {options[name]!r}: a job is one worker, and "
                "engine_from submits as many as it needs"
            )
    try:
        import dask_jobqueue
    except ImportError as error:
        raise ImportError(
            "expected dask-jobqueue, which submits the jobs, found none: "
            "pip install 'pipeinfer-dask[hpc]'"
        ) from error
    if death_timeout is None:
        death_timeout = dask.config.get("pipeinfer.hpc.death-timeout")
    if walltime is not None:  # HTCondor's has none
        options["walltime"] = walltime
    settings = f"jobqueue.{options.get('config_name') or system}"
    options |= _node_to_itself(system, exclusive, options, settings)
    options["scheduler_options"] = {
        "dashboard_address": ":0",  # the usual port is taken on many a login node
        **(dask.config.get(f"{settings}.scheduler-options", None) or {}),
        **(options.get("scheduler_options") or {}),
    }
    kind = getattr(dask_jobqueue, SYSTEMS[system].cluster)
    cluster: JobQueueCluster = kind(
        cores=cores,
        memory=memory,
        processes=1,
        interface=interface,
        local_directory=local_directory,
        death_timeout=int(parse_timedelta(death_timeout)),
        # What computes is imported before the worker reports: where it can't be, the job fails
        # at once. Of two limits the last one counts; dask-jobqueue has set one before.
        worker_extra_args=["--preload", PRELOAD, "--memory-limit", "0", *worker_extra_args],
        **options,
    )
    return cluster


def _node_to_itself(
    system: str, exclusive: bool | None, options: Mapping[str, Any], settings: str
) -> dict[str, Any]:
    """Return the options that give a job its node, beside those that are given or configured."""
    asked = dask.config.get("pipeinfer.hpc.exclusive") if exclusive is None else exclusive
    if not isinstance(asked, bool):
        raise ValueError(f"expected exclusive to be True or False, got {asked!r}")
    ways = SYSTEMS[system].exclusive
    if exclusive and not ways:
        raise ValueError(
            f"expected exclusive=False for {system}, where the site names what gives a job its "
            "node: ask it, and pass that by job_extra_directives"
        )
    found: dict[str, Any] = {}
    for name, way in ways.items() if asked else ():
        given = options.get(name)
        if given is None:
            given = dask.config.get(f"{settings}.{name.replace('_', '-')}", None)
        if isinstance(way, str):
            found[name] = way if given is None else given
        else:
            placed = any(str(line).startswith(way[0].partition("=")[0]) for line in given or ())
            found[name] = [*(given or ()), *(() if placed else way)]
    return found
