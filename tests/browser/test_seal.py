"""The seal of these tests: what a kernel's engine starts reaches this machine alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

ASK = """
import socket
import pipeinfer_dask as pi

def ask():
    with socket.socket() as line:
        try:
            line.connect(("192.0.2.1", 9))  # an address that is nobody's
        except OSError as error:
            return repr(error)

if __name__ == "__main__":
    from contextlib import ExitStack
    from pipeinfer_dask.runtime.planning.clusters import own_cluster
    with ExitStack() as resources:
        print(*own_cluster(2, resources).run(ask).values(), ask(), sep="\\n")
"""


def test_neither_a_process_nor_the_workers_that_it_starts_reach_another_machine(
    sealed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "asked.log"
    monkeypatch.setenv("PIPEINFER_SEAL_LOG", str(log))
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    refused = "PermissionError('a process of the tests asked for 192.0.2.1')"
    assert run.stdout.splitlines() == [refused] * 3, run.stderr
    assert log.read_text().splitlines() == ["192.0.2.1"] * 3
