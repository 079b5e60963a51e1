"""An engine on a cluster with TLS, and what it says of one that needs it."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster, Security, Worker
from distributed.comm import connect
from distributed.comm.addressing import get_address_host_port

import pipeinfer_dask as pi
from pipeinfer_dask import hpc
from pipeinfer_dask.cli import main
from pipeinfer_dask.runtime.links.carriers import StreamCarrier
from pipeinfer_dask.runtime.planning.clusters import _is_exposed
from tests.clusters import client_of, local_cluster
from tests.engine.pairs import PROMPT, Pair

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def tls_client() -> Iterator[Client]:
    """Two worker processes that speak TLS alone, and ask for a certificate."""
    security = Security.temporary()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            protocol="tls://",
            security=security,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster, security=security, set_as_default=False) as client,
    ):
        yield client


def carriers(dask_worker: Worker) -> set[str]:
    """Return what carries the links of the worker's nodes."""
    actors: list[Any] = list(dask_worker.state.actors.values())
    return {type(link._carrier).__name__ for actor in actors for link in actor._node._links}


def test_every_link_of_an_engine_on_a_tls_cluster_is_tls(pair: Pair, tls_client: Client) -> None:
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, client=tls_client, stages=2, share_workers=True
    ) as engine:
        result = engine.generate(PROMPT, max_new_tokens=30)
        found = tls_client.run(carriers)
        assert set().union(*found.values()) == {StreamCarrier.__name__}
        stats: Any = tls_client.sync(engine._head.pipeline.stats)  # type: ignore[attr-defined]
    assert result.token_ids == pair.greedy[:30]
    assert all(node[what] == 0 for node in stats for what in ("malformed", "gaps", "refused"))


def test_a_head_on_a_worker_of_a_tls_cluster_connects_as_the_worker_does(
    pair: Pair, tls_client: Client
) -> None:
    with pi.Engine.from_pretrained(
        pair.target, client=tls_client, stages=2, head="worker"
    ) as engine:
        result = engine.generate(PROMPT, max_new_tokens=30)
        found = tls_client.run(carriers)
        assert set().union(*found.values()) == {StreamCarrier.__name__}
    assert result.token_ids == pair.greedy[:30]


def strangers() -> dict[str, dict[str, Any]]:
    """Return the ways of one who has no certificate of this cluster to connect."""
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    return {
        "no certificate": {"ssl_context": bare},
        "another's": Security.temporary().get_connection_args("client"),
    }


@pytest.mark.parametrize("who", ["no certificate", "another's", "no tls"])
def test_a_peer_without_the_clusters_certificate_is_refused(tls_client: Client, who: str) -> None:
    (address, *_) = tls_client.scheduler_info()["workers"]
    host, port = get_address_host_port(address)

    async def speak() -> Any:
        if who == "no tls":
            comm = await connect(f"tcp://{host}:{port}", 3)
        else:
            comm = await connect(address, 3, **strangers()[who])
        try:
            await comm.write({"op": "identity", "reply": True})
            return await comm.read()
        finally:
            comm.abort()

    with pytest.raises(OSError, match=r"alert|certificate|closed|[Rr]eset|handshake|Timed out"):
        asyncio.run(speak())
    assert tls_client.run(lambda: 1)[address] == 1, "one who is let in is answered"


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        ("tcp://127.0.0.1:40", False),
        ("tcp://127.8.9.1:40", False),
        ("tcp://[::1]:40", False),
        ("tcp://localhost:40", False),
        ("inproc://192.168.1.4/12/1", False),
        ("tls://192.168.1.4:40", False),
        ("tcp://192.168.1.4:40", True),
        ("ws://10.0.0.1:40", True),
        ("tcp://[2001:db8::1]:40", True),
        ("tcp://node7:40", True),
    ],
)
def test_addresses_that_others_can_reach_without_tls_are_known(address: str, exposed: bool) -> None:
    assert _is_exposed(address) == exposed


def test_a_cluster_over_which_dask_would_unpickle_what_comes_is_refused(pair: Pair) -> None:
    with (
        client_of(1, protocol="ws", host="127.0.0.1") as client,
        pytest.raises(ValueError, match=r"listen on tcp, tls or inproc, got ws://.*--protocol"),
    ):
        pi.Engine.from_pretrained(pair.target, client=client)


@pytest.fixture(scope="module")
def exposed() -> Iterator[LocalCluster]:
    """A cluster that other machines can reach, without TLS."""
    with local_cluster(n_workers=1, protocol="tcp", host=outward_address()) as cluster:
        yield cluster


def open_on_a_client(cluster: LocalCluster, pair: Pair) -> None:
    with Client(cluster, set_as_default=False) as client:
        pi.Engine.from_pretrained(pair.target, client=client).close()


def open_with_a_head_on_a_worker(cluster: LocalCluster, pair: Pair) -> None:
    with Client(cluster, set_as_default=False) as client:
        pi.Engine.from_pretrained(pair.target, client=client, head="worker").close()


def open_by_a_queue(cluster: LocalCluster, pair: Pair) -> None:
    hpc.engine_from(cluster, pair.target, stages=1, spares=0).close()


def open_from_a_shell(cluster: LocalCluster, pair: Pair) -> None:
    what = ["x", "--target", str(pair.target), "--max-new-tokens", "1"]
    ran = CliRunner().invoke(main, ["generate", *what, "--scheduler", cluster.scheduler_address])
    assert ran.exit_code == 0, ran.output


def open_an_emulation(cluster: LocalCluster, pair: Pair) -> None:
    with Client(cluster, set_as_default=False) as client:
        pi.Emulation.open(pi.Costs.even(1, stage_s=1e-3), client=client).close()


@pytest.mark.parametrize(
    "way",
    [
        open_on_a_client,
        open_with_a_head_on_a_worker,
        open_by_a_queue,
        open_from_a_shell,
        open_an_emulation,
    ],
    ids=lambda way: way.__name__,
)
def test_a_cluster_that_others_can_reach_without_tls_is_warned_of_once_by_every_way_to_open_one(
    pair: Pair, exposed: LocalCluster, way: Callable[[LocalCluster, Pair], None]
) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        way(exposed, pair)
    told = [str(warning.message) for warning in shown if "without TLS" in str(warning.message)]
    assert len(told) == 1
    assert "such as tcp://" in told[0] and "distributed.Security" in told[0]


def outward_address() -> str:
    """Return an address of this machine that is not the loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return str(probe.getsockname()[0])


def test_weights_that_a_worker_does_not_find_are_told_before_anything_is_loaded(
    pair: Pair, tmp_path: Path, inproc_client: Client
) -> None:
    model = shutil.copytree(pair.target, tmp_path / "model")
    (model / "model.safetensors").unlink()
    told = r"worker inproc://\S+ finds no model: .*model holds no model\.safetensors"
    with pytest.raises(FileNotFoundError, match=told):
        pi.Engine.from_pretrained(model, client=inproc_client, stages=2)
