"""From a job queue to a pinned engine: jobs of the right kind, waited for and kept alive.

Importing this loads the defaults of ``pipeinfer.hpc`` into Dask's configuration.
"""

from pathlib import Path

import dask
import yaml

from pipeinfer_dask.hpc.clusters import job_cluster
from pipeinfer_dask.hpc.opening import ClusterEngine, engine_from
from pipeinfer_dask.hpc.queues import JobState
from pipeinfer_dask.hpc.waiting import JobError, StartTimeoutError, Waiting

__all__ = [
    "ClusterEngine",
    "JobError",
    "JobState",
    "StartTimeoutError",
    "Waiting",
    "engine_from",
    "job_cluster",
]

_DEFAULTS = Path(__file__).with_name("pipeinfer.yaml")

dask.config.ensure_file(source=str(_DEFAULTS))
dask.config.update_defaults(yaml.safe_load(_DEFAULTS.read_text()))
