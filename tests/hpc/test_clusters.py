"""What is submitted: job scripts as text. And what Dask's configuration says beforehand."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import dask
import pytest

from pipeinfer_dask import hpc
from pipeinfer_dask.hpc.jobs import Jobs
from pipeinfer_dask.hpc.keeping import Keeper
from pipeinfer_dask.hpc.queues import SYSTEMS
from pipeinfer_dask.hpc.scaling import Floor

JOB: dict[str, Any] = {"cores": 8, "memory": "16 GiB", "interface": "lo"}
DIRECTIVES = {
    "slurm": ["#SBATCH --cpus-per-task=8", "#SBATCH --mem=16G", "#SBATCH -t 02:00:00"],
    "pbs": ["#PBS -l select=1:ncpus=8:mem=16GB", "#PBS -l walltime=02:00:00"],
    "sge": ["#$ -l h_rt=02:00:00"],
    "lsf": ["#BSUB -n 8", "#BSUB -W 02:00"],
    "oar": ["#OAR -l /nodes=1,walltime=02:00:00"],
}
WALLTIMES = dict.fromkeys(DIRECTIVES, "02:00:00") | {"lsf": "02:00"}
EXCLUSIVE = {
    "slurm": "#SBATCH --exclusive",
    "pbs": "#PBS -l place=excl",
    "lsf": "#BSUB -x",
    "oar": "#OAR -l /nodes=1,walltime=00:30:00",
}


def job(system: str) -> dict[str, Any]:
    needed = {
        "oar": {"memory_per_core_property_name": "not_applicable"},
        "htcondor": {"disk": "1 GB"},
    }
    return JOB | needed.get(system, {})


@pytest.mark.parametrize("system", DIRECTIVES)
def test_a_job_is_one_worker_with_all_its_cores_and_no_limit_that_kills_it(system: str) -> None:
    with hpc.job_cluster(system, **job(system), walltime=WALLTIMES[system]) as cluster:
        script = cluster.job_script()
        scheduler = cluster.scheduler_address
    lines = script.splitlines()
    assert set(DIRECTIVES[system]) <= set(lines)
    command = lines[-1]
    assert command.startswith(f"{sys.executable} -m distributed.cli.dask_worker {scheduler} ")
    assert command.rpartition("--memory-limit ")[2].startswith("0")  # the last one counts
    assert "--nthreads 8 " in command
    assert "--nworkers" not in command
    assert "--death-timeout 120 " in command
    assert "--interface lo" in command
    assert "--preload pipeinfer_dask.runtime.nodes.actors " in command


def test_condors_jobs_have_no_walltime() -> None:
    with pytest.raises(ValueError, match=r"^expected no walltime, which HTCondorCluster does not"):
        hpc.job_cluster("htcondor", **job("htcondor"), walltime="02:00:00")
    with hpc.job_cluster("htcondor", **job("htcondor")) as cluster:
        script = cluster.job_script()
    assert "--preload pipeinfer_dask.runtime.nodes.actors --memory-limit 0" in script


@pytest.mark.parametrize(
    ("system", "walltime", "example"),
    [
        ("lsf", "02:00:00", "02:00"),
        ("pbs", "1-02:00:00", "02:00:00"),
        ("sge", "2h", "02:00:00"),
        ("slurm", "1:02:03:04", "02:00:00"),
        ("oar", "two", "02:00:00"),
    ],
)
def test_a_walltime_that_the_queue_would_not_take_is_refused_beforehand(
    system: str, walltime: str, example: str
) -> None:
    told = f"^expected a walltime such as {example}, got '{walltime}': set it by walltime="
    with pytest.raises(ValueError, match=told):
        hpc.job_cluster(system, **job(system), walltime=walltime)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_job_has_its_node_to_itself_unless_it_need_not_or_its_queue_has_no_word_for_it(
    system: str,
) -> None:
    def script(**options: Any) -> list[str]:
        with hpc.job_cluster(system, **job(system), **options) as cluster:
            return str(cluster.job_script()).splitlines()

    if system not in EXCLUSIVE:
        assert not [line for line in script() if "excl" in line]
        with pytest.raises(ValueError, match=f"^expected exclusive=False for {system}, where the"):
            script(exclusive=True)
        return
    assert EXCLUSIVE[system] in script()
    assert EXCLUSIVE[system] not in script(exclusive=False)
    with dask.config.set({"pipeinfer.hpc.exclusive": False}):
        assert EXCLUSIVE[system] not in script()
        assert EXCLUSIVE[system] in script(exclusive=True)


@pytest.mark.parametrize(
    ("system", "options", "line"),
    [
        ("slurm", {"job_extra_directives": ["--exclusive=user"]}, "#SBATCH --exclusive=user"),
        ("pbs", {"job_extra_directives": ["-l place=scatter:excl"]}, "#PBS -l place=scatter:excl"),
        ("oar", {"resource_spec": "/host=1"}, "#OAR -l /host=1,walltime=00:30:00"),
    ],
)
def test_directives_of_ones_own_say_how_a_job_is_placed(
    system: str, options: dict[str, Any], line: str
) -> None:
    with hpc.job_cluster(system, **job(system), **options) as cluster:
        script = cluster.job_script().splitlines()
    assert line in script
    assert EXCLUSIVE[system] not in script


def test_directives_that_dask_jobqueue_has_configured_stay_beside_it() -> None:
    configured = {"jobqueue.slurm.job-extra-directives": ["--constraint=bigmem"]}
    with dask.config.set(configured), hpc.job_cluster("slurm", **JOB) as cluster:
        script = cluster.job_script().splitlines()
    assert {"#SBATCH --constraint=bigmem", "#SBATCH --exclusive"} <= set(script)


def test_exclusive_is_true_or_false() -> None:
    with pytest.raises(ValueError, match=r"^expected exclusive to be True or False, got 'maybe'"):
        hpc.job_cluster("slurm", **JOB, exclusive="maybe")  # type: ignore[arg-type]


def test_whatever_else_a_cluster_takes_is_passed_on() -> None:
    with hpc.job_cluster(
        "slurm",
        queue="long",
        account="physics",
        death_timeout="1 minute",
        local_directory="/scratch",
        worker_extra_args=["--lifetime", "55m"],
        job_extra_directives=["--constraint=bigmem"],
        job_script_prologue=["module load python"],
        **JOB,
    ) as cluster:
        script = cluster.job_script()
    assert {"#SBATCH -p long", "#SBATCH -A physics", "#SBATCH --constraint=bigmem"} <= set(
        script.splitlines()
    )
    assert "\nmodule load python\n" in script
    assert "--death-timeout 60 --local-directory /scratch" in script
    assert "--memory-limit 0 --lifetime 55m" in script


def test_what_is_not_given_is_read_from_the_configurations_of_dask_jobqueue_and_ours() -> None:
    with (
        dask.config.set(
            {
                "jobqueue.slurm.queue": "long",
                "jobqueue.slurm.cores": 4,
                "jobqueue.slurm.memory": "8 GB",
                "pipeinfer.hpc.death-timeout": "3 minutes",
            }
        ),
        hpc.job_cluster("slurm", interface="lo") as cluster,
    ):
        script = cluster.job_script()
    assert "#SBATCH -p long" in script
    assert "--nthreads 4 " in script
    assert "--death-timeout 180 " in script


def test_defaults_stand_in_dasks_configuration_and_the_environment_overrides_them() -> None:
    assert dask.config.get("pipeinfer.hpc.start-timeout") == "10 minutes"
    given = dask.config.collect(paths=[], env={"DASK_PIPEINFER__HPC__START_TIMEOUT": "2 hours"})
    assert dask.config.get("pipeinfer.hpc.start-timeout", config=given) == "2 hours"


def test_an_unknown_queueing_system_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^expected a queueing system of slurm, pbs, sge, lsf, oar, htcondor, got"
    ):
        hpc.job_cluster("cron")


@pytest.mark.parametrize("name", ["processes", "n_workers"])
def test_jobs_of_several_workers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^expected no {name}, got 2: a job is one worker"):
        hpc.job_cluster("slurm", **JOB | {name: 2})


def test_without_dask_jobqueue_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ImportError, match=r"pip install 'pipeinfer-dask\[hpc\]'$"):
        hpc.job_cluster("slurm", **JOB)


def test_jobs_are_looked_after_whatever_one_look_at_them_ends_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeinfer_dask.hpc.keeping.GLANCE_S", 0.0)
    with hpc.job_cluster("slurm", **job("slurm")) as cluster:

        class Odd(Jobs):
            """The first two looks at it end in what nobody has thought of."""

            looks = 0
            seen = asyncio.Event()

            def with_worker(self) -> set[str]:
                self.looks += 1
                if self.looks < 3:
                    raise LookupError("no such job")
                self.seen.set()
                return super().with_worker()

        async def main() -> None:
            jobs = Odd(cluster)
            keeping = asyncio.create_task(Keeper(jobs, 1.0, Floor(cluster, 1)).keep())
            async with asyncio.timeout(30):
                await jobs.seen.wait()
            keeping.cancel()

        asyncio.run(main())
    assert (
        caplog.messages.count(
            "jobs could not be looked after, tries again: LookupError: no such job"
        )
        == 1
    )
