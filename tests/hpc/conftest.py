"""Skips what needs a Slurm, MPI or SSH that is not there. Where ``PIPEINFER_HPC=1`` all must be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.hpc import slurm as slurms
from tests.hpc.slurm import Slurm


def _lacking_mpi() -> str | None:
    if shutil.which("mpirun") and find_spec("dask_mpi") and find_spec("mpi4py"):
        return None
    return "no MPI: apt-get install openmpi-bin, and '.[hpc]'"


def _lacking_ssh() -> str | None:
    if slurms.program("sshd") and shutil.which("ssh-keygen") and find_spec("asyncssh"):
        return None
    return "no SSH: apt-get install openssh-server, and '.[hpc]'"


LACKING = {"slurm": slurms.lacking, "mpi": _lacking_mpi, "ssh": _lacking_ssh}
"""By marker, who says what is missing."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, lacking in LACKING.items():
        marked = [item for item in items if item.get_closest_marker(marker) is not None]
        if not marked or (missing := lacking()) is None:
            continue
        if os.environ.get("PIPEINFER_HPC") == "1":
            raise pytest.UsageError(missing)
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    with Slurm() as slurm, pytest.MonkeyPatch.context() as patch:
        # Read by the commands that dask-jobqueue runs.
        patch.setenv("SLURM_CONF", str(slurm.configuration))
        yield slurm
