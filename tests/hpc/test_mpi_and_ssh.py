"""Engines on workers that MPI or SSH has started, where they are installed."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import distributed
import pytest

import pipeinfer_dask as pi
from pipeinfer_dask import hpc
from tests.docs.blocks import block_with
from tests.hpc.slurm import free_ports, program, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plain() -> str:
    """Return what the target says by itself."""
    with pi.Engine.from_pretrained(pi.demo_pair()[0], in_process=True) as engine:
        return engine.generate("def main").text


@pytest.mark.mpi
def test_the_ranks_of_an_mpi_job_generate_what_plain_decoding_gives(plain: str) -> None:
    ran = subprocess.run(
        ["mpirun", "--oversubscribe", "-n", "5", sys.executable, "examples/mpi.py"],
        cwd=ROOT,
        env=os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == plain + "\n"


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[list[str]]:
    """Run an sshd for this user alone, and return the options that reach it."""
    sshd = program("sshd")
    assert sshd is not None
    for name in ("host", "user"):
        key = str(tmp_path / name)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # it insists
    (port,) = free_ports(1)
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
    options = {
        "ListenAddress": "127.0.0.1",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "user.pub",
        "StrictModes": "no",  # a test's folder lies in one that others may write to
        "PidFile": "none",
    }
    given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    log = tmp_path / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sshd, "-D", "-e", "-f", "/dev/null", "-p", str(port), *given], stderr=errors
        ) as daemon,
    ):
        try:
            until(lambda: b"listening on" in log.read_bytes(), "an sshd")
            yield [
                "--port",
                str(port),
                "--key",
                str(tmp_path / "user"),
                "--known-hosts",
                str(known),
            ]
        finally:
            daemon.terminate()


@pytest.mark.ssh
@pytest.mark.filterwarnings("ignore:other machines can reach this cluster:UserWarning")
def test_workers_started_over_ssh_generate_what_plain_decoding_gives(
    plain: str, ssh: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "ssh.py"))["main"]
    main([*["127.0.0.1"] * 4, "--remote-python", sys.executable, *ssh])
    assert capsys.readouterr().out == plain + "\n"


@pytest.mark.ssh
@pytest.mark.filterwarnings("ignore:other machines can reach this cluster:UserWarning")
def test_what_the_page_shows_for_ssh_generates_what_plain_decoding_gives(
    plain: str, ssh: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    port, key, known = ssh[1::2]
    ways = {
        "remote_python": sys.executable,
        "connect_options": {"port": int(port), "client_keys": [key], "known_hosts": known},
        "scheduler_options": {"port": 0, "dashboard": False},
    }
    code = re.sub(r'"node\d"', '"127.0.0.1"', block_with(ROOT / "docs" / "hpc.md", "SSHCluster"))
    code, count = re.subn(r"remote_python=.*,", "**ways,", code)
    assert count == 1
    target, draft = pi.demo_pair()
    names = {"distributed": distributed, "hpc": hpc, "target": target, "draft": draft}
    exec(code.replace('"nthreads": 32', '"nthreads": 1'), names | {"ways": ways})
    assert capsys.readouterr().out == plain + "\n"
