"""What the page on clusters shows for clusters runs on one, but for the names of its machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed
import pytest
from distributed.security import Security

import pipeinfer_dask as pi
from pipeinfer_dask import hpc
from tests.docs.blocks import blocks

PAGE = Path(__file__).parents[2] / "docs" / "hpc.md"


def code(part: str) -> str:
    """Return the block for a cluster in which this stands."""
    (found,) = [b.code for b in blocks(PAGE) if b.on_a_cluster and part in b.code]
    return found


@pytest.mark.cluster
def test_engines_of_the_page_open_on_the_workers_of_a_cluster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, draft = pi.demo_pair()
    security = Security.temporary()
    cluster = distributed.LocalCluster(
        n_workers=6,
        threads_per_worker=1,
        processes=False,
        protocol="tls://",
        security=security,
        memory_limit=0,
        dashboard_address="127.0.0.1:0",
    )
    names: dict[str, Any] = {
        "cluster": cluster,
        "security": security,
        "target": target,
        "draft": draft,
        "hpc": hpc,
        "distributed": distributed,
    }
    # The last one closes the cluster, as its `with` says.
    with cluster:
        there_already = code("Client(").replace("tls://10.0.0.1:8786", cluster.scheduler_address)
        for block in (there_already, code('head="worker"')):
            exec(block, names)
            text = names["engine"].generate("def main").text
            names["engine"].close()
        names["client"].close()
        exec(code("spares=1"), names)
    assert "stage 3 (layers " in (printed := capsys.readouterr().out)
    assert printed.endswith(f"{text}\n")


def test_the_pages_jobs_speak_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".pipeinfer").mkdir()
    names: dict[str, Any] = {"hpc": hpc}
    exec(code("security=True"), names)
    with names["cluster"] as cluster:
        assert cluster.scheduler_address.startswith("tls://")
        assert "--tls-key ~/.pipeinfer/" in cluster.job_script()
        assert len(list((tmp_path / ".pipeinfer").iterdir())) == 3
