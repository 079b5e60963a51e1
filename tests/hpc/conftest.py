"""A Slurm of the tests' own, where it is installed. Where ``PIPEINFER_SLURM=1`` it has to be."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.hpc.slurm import Slurm, lacking


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = lacking()
    if missing is None or os.environ.get("PIPEINFER_SLURM") == "1":
        return
    for item in items:
        if item.get_closest_marker("slurm") is not None:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    with Slurm() as slurm, pytest.MonkeyPatch.context() as patch:
        # Read by the commands that dask-jobqueue runs.
        patch.setenv("SLURM_CONF", str(slurm.configuration))
        yield slurm
