"""Workers that lack this package, or have another version of it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from click.testing import CliRunner
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.cli import main
from pipeinfer_dask.models.specs import ShardSpec
from pipeinfer_dask.runtime.nodes.actors import NodeActor
from pipeinfer_dask.runtime.planning.workers import check_packages
from tests.clusters import client_of
from tests.engine.pairs import PROMPT, Pair

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
LONG = 480
OTHERS = """
import importlib.metadata, os, sys
from importlib.metadata import PackageNotFoundError, version

class Without:
    def find_spec(name, path=None, target=None):
        if name == os.environ["LACKING"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def told(name):
    if name != "pipeinfer-dask":
        return version(name)
    if not (known := os.environ["VERSION"]):
        raise PackageNotFoundError(name)
    return known

sys.meta_path.insert(0, Without)
importlib.metadata.version = told
"""
"""What the workers' Python runs at its start: of our package they have what the test says."""

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("others")
    (home / "sitecustomize.py").write_text(OTHERS)
    return home


@contextmanager
def started(home: Path) -> Iterator[tuple[Client, Start]]:
    """A cluster without workers, and what starts one in a process of its own."""
    with client_of(0, protocol="tcp") as client:
        processes: list[subprocess.Popen[bytes]] = []

        def start(lacking: str = "", version: str = "", name: str = "") -> subprocess.Popen[bytes]:
            command = ["-m", "distributed.cli.dask_worker", address_of(client), "--no-nanny"]
            options = ["--no-dashboard", "--memory-limit", "0", "--name", name or "whole"]
            environment = {"PYTHONPATH": f"{home}{os.pathsep}{ROOT}"}
            environment |= {"LACKING": lacking, "VERSION": version}
            process = subprocess.Popen(
                [sys.executable, *command, *options],
                env=os.environ | environment,
                cwd=home,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            processes.append(process)
            return process

        try:
            yield client, start
        finally:
            for process in processes:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def odd(home: Path) -> Iterator[tuple[Client, dict[str, str]]]:
    """Three workers, and their addresses by name: none is like this process."""
    with started(home) as (client, start):
        start("pipeinfer_dask", name="without")
        start("pipeinfer_dask.runtime.nodes.room", "0.0.1", name="torn")
        start("", "0.0.1", name="older")
        client.wait_for_workers(3, timeout=60)
        yield client, addresses(client)


def address_of(client: Client) -> str:
    """The scheduler's."""
    return str(client.scheduler_info()["address"])


def addresses(client: Client) -> dict[str, str]:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {about["name"]: worker for worker, about in workers.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"stages": 3},
        {"stages": 3, "head": "worker"},
        {"stages": 1, "spares": 2},
    ],
    ids=["client", "worker", "spares"],
)
def test_workers_that_could_not_import_what_they_are_to_hold_are_named_and_live_on(
    odd: tuple[Client, dict[str, str]], pair: Pair, options: dict[str, Any]
) -> None:
    client, workers = odd
    with pytest.raises(RuntimeError) as refused:
        pi.Engine.from_pretrained(pair.target, client=client, **options)
    reason = str(refused.value)
    assert reason.startswith("expected workers that can import pipeinfer-dask, got worker tcp://")
    assert "and 1 more, with " in reason
    assert "ModuleNotFoundError: No module named 'pipeinfer_dask" in reason
    assert reason.endswith(f"install the same version there as here, {pi.__version__}")
    assert "\n" not in reason
    assert addresses(client) == workers


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("without", "none: ModuleNotFoundError: No module named 'pipeinfer_dask'"),
        (
            "torn",
            f"0.0.1 in {ROOT / 'pipeinfer_dask'}: ModuleNotFoundError: No module named "
            "'pipeinfer_dask.runtime.nodes.room'",
        ),
    ],
)
def test_what_a_worker_has_instead_is_told(
    odd: tuple[Client, dict[str, str]], name: str, there: str
) -> None:
    client, workers = odd
    with pytest.raises(RuntimeError) as refused:
        check_packages(client, [workers[name]], (NodeActor, ShardSpec))
    assert str(refused.value) == (
        f"expected workers that can import pipeinfer-dask, got worker {workers[name]}, with "
        f"{there}: install the same version there as here, {pi.__version__}"
    )


def test_another_version_that_has_all_that_is_needed_is_warned_of_and_used(
    odd: tuple[Client, dict[str, str]],
) -> None:
    client, workers = odd
    with pytest.warns(UserWarning, match=f"got worker {workers['older']}, with 0.0.1: should any"):
        check_packages(client, [workers["older"]], (NodeActor, ShardSpec))


def test_the_command_line_tells_of_such_workers_in_one_line(
    odd: tuple[Client, dict[str, str]], pair: Pair
) -> None:
    client, _ = odd
    arguments = ["generate", "x", "--target", str(pair.target), "--stages", "3"]
    ran = CliRunner().invoke(main, [*arguments, "--scheduler", address_of(client)])
    assert ran.exit_code == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("Error: expected workers that can import pipeinfer-dask, got worker")


class Heard(logging.Handler):
    """Notes when the log says something."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words
        self.event = Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.words in record.getMessage():
            self.event.set()


@contextmanager
def heard(words: str) -> Iterator[Event]:
    """What is set once the log of this process has these words."""
    handler, logger = Heard(words), logging.getLogger("pipeinfer_dask")
    logger.addHandler(handler)
    try:
        yield handler.event
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("head", "lacking"),
    [("client", "pipeinfer_dask"), ("worker", "pipeinfer_dask.runtime.nodes.room")],
)
def test_a_lost_node_waits_for_a_worker_that_can_import_it(
    home: Path, pair: Pair, head: str, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pipeline.assembly", "head.remote_head"):
        monkeypatch.setattr(f"pipeinfer_dask.runtime.{module}.RETRY_S", 0.05)
    reason = f"ModuleNotFoundError: No module named {lacking!r}"
    with heard(reason) as ruled_out, started(home) as (client, start):
        first = start()
        client.wait_for_workers(1, timeout=60)
        with pi.Engine.from_pretrained(pair.target, client=client, stages=1, head=head) as engine:
            expected = engine.generate(PROMPT, max_new_tokens=LONG).token_ids
            other = start(lacking, name="other")
            client.wait_for_workers(2, timeout=60)
            generation = engine.start(PROMPT, max_new_tokens=LONG)
            next(iter(generation))
            first.kill()
            assert ruled_out.wait(60)
            assert client.cluster is not None
            client.cluster.scale(1)  # in this process
            assert generation.result(60).token_ids == expected
            assert other.poll() is None
