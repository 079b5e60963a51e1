"""Engines through a real Slurm: jobs that run, that wait, that fail and that are lost."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Adaptive, Client

import pipeinfer_dask as pi
from pipeinfer_dask import hpc
from tests.hpc.slurm import Slurm, until

pytestmark = [pytest.mark.slurm, pytest.mark.cluster, pytest.mark.timeout(300)]

PROMPT = "def main"
NEW_TOKENS = 64
PATIENCE_S = 120.0
FIRST_TOKEN_S = 30.0
"""From sbatch on, with three jobs to start."""


def job_cluster(folder: Path, **options: Any) -> Any:
    asked: dict[str, Any] = {"cores": 1, "memory": "1 GB", "walltime": "60", "interface": "lo"}
    return hpc.job_cluster("slurm", log_directory=str(folder), **asked | options)


@pytest.fixture(scope="module")
def plain() -> str:
    """Return what the target says by itself."""
    with pi.Engine.from_pretrained(pi.demo_pair()[0], in_process=True) as engine:
        return engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).text


def test_the_example_generates_through_jobs_what_plain_decoding_gives(
    slurm: Slurm, plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "slurm.py"))["main"]
    asked = ["--interface", "lo", "--memory", "1 GB", "--new-tokens", str(NEW_TOKENS)]
    main([*asked, "--log-directory", str(tmp_path), PROMPT])
    printed = capsys.readouterr()
    assert printed.out == plain + "\n"
    assert "stage 1 (layers 3 to 5): " in printed.err
    assert ", worker SLURMCluster-" in printed.err
    until(lambda: not slurm.say("squeue", "--noheader"), "jobs that end with their cluster")


def test_a_text_goes_on_when_its_stages_job_is_cancelled_and_another_job_takes_the_place(
    slurm: Slurm, plain: str, tmp_path: Path
) -> None:
    with (
        job_cluster(tmp_path) as cluster,
        Client(cluster, set_as_default=False) as observer,
        hpc.engine_from(cluster, pi.demo_pair()[0], stages=1, spares=1) as engine,
    ):
        lost = engine.nodes["stage 0 (layers 0 to 5)"].rpartition(" ")[2]
        (spare,) = set(cluster.worker_spec) - {lost}
        runs = [engine.start(PROMPT, max_new_tokens=NEW_TOKENS)]
        next(iter(runs[0]))
        slurm.say("scancel", str(cluster.workers[lost].job_id))
        while True:  # a job takes a while to end: until then there is always a text under way
            runs.append(engine.start(PROMPT, max_new_tokens=NEW_TOKENS))
            result = runs.pop(0).result()
            assert result.text == plain
            if result.metrics.losses:
                break
        assert runs[0].result().text == plain
        assert engine.nodes["stage 0 (layers 0 to 5)"].endswith(f", worker {spare}")

        def replaced() -> bool:
            workers = observer.scheduler_info(n_workers=-1)["workers"].values()
            names = {worker["name"] for worker in workers}
            return spare in names and lost not in names and len(names) == 2

        until(replaced, "another worker in place of the one that was lost")


def test_a_text_waits_for_the_job_that_is_submitted_in_place_of_a_cancelled_one(
    slurm: Slurm,
    plain: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, draft = pi.demo_pair()
    with job_cluster(tmp_path) as cluster:
        submitted = time.monotonic()
        with hpc.engine_from(cluster, target, draft, stages=2) as engine:
            run = engine.start(PROMPT, max_new_tokens=NEW_TOKENS)
            next(iter(run))
            first_token_s = time.monotonic() - submitted
            assert run.result(PATIENCE_S).text == plain
            before = set(cluster.worker_spec)
            assert len(before) == 3
            nodes = slurm.say("squeue", "--noheader", "--format=%N").split()
            assert len(set(nodes)) == 3, "each job has its node to itself"

            lost = engine.nodes["stage 1 (layers 3 to 5)"].rpartition(" ")[2]
            runs = [engine.start(PROMPT, max_new_tokens=NEW_TOKENS)]
            next(iter(runs[0]))
            with slurm.starting_nothing_until(lambda: "waits for the worker of" in caplog.text):
                slurm.say("scancel", str(cluster.workers[lost].job_id))
                while True:  # a job takes a while to end: until then there is always a text
                    runs.append(engine.start(PROMPT, max_new_tokens=NEW_TOKENS))
                    result = runs.pop(0).result(PATIENCE_S)
                    assert result.text == plain
                    if result.metrics.losses:
                        break
                assert runs[0].result(PATIENCE_S).text == plain
            (submitted_anew,) = set(cluster.worker_spec) - before
            places = engine.nodes
        assert places["stage 1 (layers 3 to 5)"].endswith(f", worker {submitted_anew}")
        assert places.pop("head") == "client"
        assert len(set(places.values())) == 3
    with capsys.disabled():
        sys.stdout.write(f"\nfrom sbatch to the first token: {first_token_s:.1f} s\n")
    if os.environ.get("PIPEINFER_HPC") == "1":  # as CI runs it: alone
        assert first_token_s < FIRST_TOKEN_S
    assert f"{lost} is lost (job " in caplog.text
    assert re.search(rf"waits for the worker of {submitted_anew}: job \d+: PENDING", caplog.text)


@pytest.fixture
def submissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return what tells how often a job was submitted, whether the queue took it or not."""
    sbatch, log = tmp_path / "bin" / "sbatch", tmp_path / "submissions"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho >>{log}\nexec {shutil.which("sbatch")} "$@"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    return lambda: len(log.read_text().splitlines())


@pytest.mark.parametrize("scales", [False, True])
def test_any_number_of_losses_is_made_good_also_of_jobs_that_never_ran(
    slurm: Slurm,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    submissions: Callable[[], int],
    scales: bool,
) -> None:
    with (
        job_cluster(tmp_path) as cluster,
        Client(cluster, set_as_default=False) as observer,
    ):
        if scales:
            cluster.adapt(minimum=0, maximum=4, interval="100ms", wait_count=1)
        engine = hpc.engine_from(cluster, pi.demo_pair()[0], "ngram", stages=1)

        def job() -> str:
            (name,) = cluster.worker_spec or {""}
            submitted = cluster.workers.get(name)
            return str(submitted.job_id) if submitted is not None else ""

        first = job()
        slurm.say("scontrol", "update", "PartitionName=debug", "State=DRAIN")
        try:
            slurm.say("scancel", first)
            until(lambda: "the queue takes no job, 4 s later again: " in caplog.text, "refusals")
            # One that was taken, and three that were not, with pauses of one and two seconds.
            assert submissions() == 1 + 3
            [state] = engine.lacking
            assert re.fullmatch(r"refused \(.*Required partition not available.*\)", state.words)
        finally:
            slurm.say("scontrol", "update", "PartitionName=debug", "State=UP")
        assert "Required partition not available (inactive or drain)" in caplog.text
        until(lambda: job() not in ("", first, "None"), "a job in place of the lost one")
        second = job()
        slurm.say("scancel", second)
        until(lambda: job() not in ("", second, "None"), "a job in place of this one, too")
        until(lambda: observer.scheduler_info()["workers"] != {}, "its worker")
        assert engine.generate(PROMPT, max_new_tokens=4).token_ids
        until(lambda: engine.lacking == (), "a queue that nobody waits for")
        engine.close()


class Counting(Adaptive):
    """Counts its rounds in which a job is still to come."""

    waited = 0

    async def adapt(self) -> None:
        await super().adapt()
        self.waited += bool(self.plan - self.observed)


def test_a_cluster_that_scales_itself_down_to_nothing_cancels_no_job_that_an_engine_waits_for(
    slurm: Slurm, plain: str, tmp_path: Path
) -> None:
    target, draft = pi.demo_pair()
    with job_cluster(tmp_path) as cluster:
        scaling = cluster.adapt(
            Adaptive=Counting, minimum=0, maximum=4, interval="100ms", wait_count=1
        )

        def waits(rounds: int) -> Callable[[], bool]:
            enough = scaling.waited + rounds
            return lambda: scaling.waited >= enough

        with (
            slurm.starting_nothing_until(waits(5)),
            hpc.engine_from(cluster, target, draft, stages=2) as engine,
        ):
            jobs = set(cluster.worker_spec)
            assert len(jobs) == 3 and scaling.minimum == 3
            lost = engine.nodes["stage 1 (layers 3 to 5)"].rpartition(" ")[2]
            slurm.say("scontrol", "update", "PartitionName=debug", "State=DOWN")
            try:
                slurm.say("scancel", str(cluster.workers[lost].job_id))
                until(lambda: lost not in cluster.worker_spec, "a job in place of the lost one")
                replaced = set(cluster.worker_spec)
                until(waits(5), "rounds of scaling while it waits")
            finally:
                slurm.say("scontrol", "update", "PartitionName=debug", "State=UP")
            assert replaced > jobs - {lost} and len(replaced) == 3
            assert engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).text == plain
            assert set(cluster.worker_spec) == replaced, "none of them was cancelled"
            anew = cluster.adapt(minimum=0, maximum=4)
            until(lambda: anew.minimum == 3, "a minimum that holds for this scaling, too")
        assert (scaling.minimum, anew.minimum) == (0, 0)
        until(lambda: not slurm.say("squeue", "--noheader"), "a cluster without workers")


def test_a_job_that_waits_is_told_in_the_queues_own_words_and_stays_in_the_queue(
    slurm: Slurm, tmp_path: Path
) -> None:
    steps: list[Any] = []
    with job_cluster(tmp_path, walltime="180") as cluster:
        with pytest.raises(
            hpc.StartTimeoutError,
            match=r"^expected 1 workers within 3 s, got 0; of the others the queue says: "
            r"job \d+: PENDING \((PartitionTimeLimit|PartitionConfig)\)\. Ask for less, or allow",
        ):
            hpc.engine_from(
                cluster, pi.demo_pair()[0], stages=1, start_timeout=3, progress=steps.append
            )
        assert slurm.say("squeue", "--noheader", "--format=%T").split() == ["PENDING"]
        assert str(steps[-1]).startswith("0 of 1 workers; jobs: 1 PENDING (Partition")
    until(lambda: not slurm.say("squeue", "--noheader"), "jobs that end with their cluster")


def test_on_a_cluster_that_scales_itself_it_is_told_that_a_job_that_waits_is_cancelled(
    slurm: Slurm, tmp_path: Path
) -> None:
    with job_cluster(tmp_path, walltime="180") as cluster:
        cluster.adapt(minimum=0, maximum=4, interval="100ms", wait_count=1)
        with pytest.raises(
            hpc.StartTimeoutError,
            match=r"by start_timeout: the cluster scales itself, and cancels those that it does",
        ):
            hpc.engine_from(cluster, pi.demo_pair()[0], stages=1, start_timeout=3)
        until(lambda: not slurm.say("squeue", "--noheader"), "a queue without jobs")


def test_a_job_that_fails_is_told_with_its_last_words(slurm: Slurm, tmp_path: Path) -> None:
    with (
        job_cluster(tmp_path, python="/nowhere/python") as cluster,
        pytest.raises(
            hpc.JobError,
            match=r"(?s)^expected a worker of each job, but job \d+: FAILED \(NonZeroExitCode\), "
            r"exit code 127, before its worker came\. Its log ends with:\n.*/nowhere/python: ",
        ),
    ):
        hpc.engine_from(cluster, pi.demo_pair()[0], stages=1, start_timeout=60)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"queue": "nowhere"}, "invalid partition specified: nowhere"),
        ({"memory": "900 GB"}, "Memory specification can not be satisfied"),
    ],
)
def test_a_job_that_the_queue_refuses_is_told_in_its_words(
    slurm: Slurm, tmp_path: Path, asked: dict[str, Any], words: str
) -> None:
    with job_cluster(tmp_path, **asked) as cluster:
        with pytest.raises(hpc.JobError, match=rf"^expected the queue to take a job, .*{words}"):
            hpc.engine_from(cluster, pi.demo_pair()[0], stages=2)
        assert not cluster.worker_spec  # so that another try submits anew


def test_too_short_a_walltime_is_refused_before_anything_is_submitted(
    slurm: Slurm, tmp_path: Path
) -> None:
    with (
        job_cluster(tmp_path, walltime="5") as cluster,
        pytest.raises(
            ValueError, match=r"at least 600 s left to run, got a walltime of 300 s: ask"
        ),
    ):
        hpc.engine_from(cluster, pi.demo_pair()[0], stages=1)
    assert not slurm.say("squeue", "--noheader")


def test_jobs_that_have_run_too_long_when_all_have_come_are_refused_with_their_age(
    slurm: Slurm, tmp_path: Path
) -> None:
    with (
        job_cluster(tmp_path, walltime="60") as cluster,
        pytest.raises(
            ValueError,
            match=r"at least 3600 s left to run, got a walltime of 3600 s that has run for \d+ s "
            r"already \(tcp://127\.0\.0\.1:\d+\): ask for a longer walltime",
        ),
    ):
        hpc.engine_from(cluster, pi.demo_pair()[0], stages=1, least_runtime=3600)


def test_a_slurm_that_is_started_by_hand_ends_on_ctrl_c_with_all_that_it_runs(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "tests.hpc.slurm"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        said = iter(running.stdout.readline, "")
        line = next(line for line in said if line.startswith("export SLURM_CONF="))
        configuration = Path(line.partition("=")[2].strip())
        daemons = psutil.Process(running.pid).children(recursive=True)
        told = tmp_path / "pid"
        job = f"--wrap=echo $$ > {told}.new; mv {told}.new {told}; sleep 600"
        subprocess.run(
            ["sbatch", "--output=/dev/null", job],
            env=os.environ | {"SLURM_CONF": str(configuration)},
            check=True,
        )
        until(told.exists, "a job that runs")
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE_S) == 0
    assert {daemon.is_running() for daemon in daemons} == {False}
    assert not psutil.pid_exists(int(told.read_text()))
    assert not configuration.parent.exists()
