"""What pages show for clusters runs on one, but for the names of its machines."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed
import pytest
from distributed.security import Security

import pipeinfer_dask as pi
from pipeinfer_dask import hpc
from tests.clusters import local_cluster
from tests.docs.blocks import block_with, blocks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "hpc.md"
USERS = ROOT / "docs" / "several-users.md"


def code(part: str) -> str:
    return block_with(PAGE, part)


@pytest.mark.cluster
def test_engines_of_the_page_open_on_the_workers_of_a_cluster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, draft = pi.demo_pair()
    security = Security.temporary()
    cluster = local_cluster(n_workers=6, protocol="tls://", security=security)
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


def test_the_page_shows_the_script_of_the_job_that_it_makes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (shown,) = [b.code for b in blocks(PAGE) if "#SBATCH" in b.code and b.language == "text"]
    exec(code("print(cluster.job_script())"), {})
    script = capsys.readouterr().out.replace(sys.executable, "python")
    address = r"tcp://[\d.]+:\d+"
    (scheduler,) = re.findall(address, shown)
    # The page breaks the last line, which is long.
    assert re.sub(address, scheduler, script).split() == shown.split()


@pytest.mark.cluster
def test_a_pupils_notebook_reads_what_the_server_of_the_class_generates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for needed in ("starlette", "uvicorn", "httpx"):
        pytest.importorskip(needed, reason="needs '.[examples]'")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # Who asks before there is a server waits for it.
        serving = ["-m", "uvicorn", "--app-dir", "examples", "web_handler:app"]
        with subprocess.Popen(
            [sys.executable, *serving, "--fd", str(listening.fileno())],
            cwd=ROOT,
            pass_fds=[listening.fileno()],
        ) as server:
            here = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            try:
                exec(block_with(USERS, "httpx").replace("http://10.0.0.1:8000/", here), {})
            finally:
                server.terminate()
    with pi.Engine.from_pretrained(pi.demo_pair().target, in_process=True) as plain:
        assert capsys.readouterr().out == plain.generate("def main", max_new_tokens=64).text
