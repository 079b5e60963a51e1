"""Traces that the tests of this folder share: one of virtual time, one of real time."""

from __future__ import annotations

import pytest

from pipeinfer_dask.runtime.emulation.emulation import Emulation
from pipeinfer_dask.simulation import Costs, simulate
from pipeinfer_dask.trace import Trace


@pytest.fixture(scope="session")
def simulated() -> Trace:
    return simulate("pipeinfer", stages=3, acceptance=0.6, max_new_tokens=60).trace


@pytest.fixture(scope="session")
def measured() -> Trace:
    """Of real nodes, links and clocks; only what they compute is emulated."""
    costs = Costs.even(3, stage_s=0.02)
    with Emulation.open(costs, acceptance=0.6, in_process=True) as emulation:
        return emulation.generate("pipeinfer", max_new_tokens=60, timeout=60.0).trace


@pytest.fixture(params=["simulated", "measured"])
def either(request: pytest.FixtureRequest) -> Trace:
    trace = request.getfixturevalue(request.param)
    assert isinstance(trace, Trace)
    return trace
