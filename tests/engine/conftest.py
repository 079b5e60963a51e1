"""Model pairs and clusters that the tests of the engine share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache

import pytest
import torch
from distributed import Client

from pipeinfer_dask.runtime.planning.clusters import own_cluster
from tests.clusters import client_of
from tests.engine.pairs import LAYERS, Pair, PairOf, make_pair

# Operations on such small models only lose by being shared out among cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> PairOf:
    """Return the pair of a family and a draft's quality, made when it is first asked for."""

    @cache
    def make(family: str, quality: str) -> Pair:
        return make_pair(tmp_path_factory.mktemp(family), family, quality)

    return make


@pytest.fixture(scope="session")
def pair(pair_of: PairOf) -> Pair:
    return pair_of("llama", "partly right")


@pytest.fixture(scope="session")
def inproc_client() -> Iterator[Client]:
    """A cluster in this process: a worker for each layer, and one for the drafter."""
    with client_of(LAYERS + 1) as client:
        yield client


@pytest.fixture(scope="session")
def tcp_client() -> Iterator[Client]:
    """The same with a process for each worker."""
    with ExitStack() as resources:
        yield own_cluster(LAYERS + 1, resources)
