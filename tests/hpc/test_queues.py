"""What queues say, and how long jobs may run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeinfer_dask.hpc.jobs import check_runtime
from pipeinfer_dask.hpc.queues import SYSTEMS, JobState, slurm_states, state_of, states_of


@pytest.mark.parametrize(
    ("system", "line", "seconds"),
    [
        ("slurm", "#SBATCH -t 30", 30 * 60),
        ("slurm", "#SBATCH -t 30:05", 30 * 60 + 5),
        ("slurm", "#SBATCH --time=02:00:00", 2 * 3600),
        ("slurm", "#SBATCH -t 1-6", 30 * 3600),
        ("slurm", "#SBATCH -t 2-00:30", 48 * 3600 + 30 * 60),
        ("slurm", "#SBATCH -t 00:30:00\n#SBATCH --time=01:00:00", 3600),
        ("slurm", "#SBATCH -n 1", None),
        ("pbs", "#PBS -l walltime=00:30:00", 1800),
        ("pbs", "#PBS -l select=1:ncpus=2,walltime=90", 90),
        ("sge", "#$ -l h_rt=00:30:00", 1800),
        ("lsf", "#BSUB -W 01:30", 5400),
        ("lsf", "#BSUB -W 90", 5400),
        ("oar", "#OAR -l /nodes=1/core=4,walltime=02:00:00", 7200),
        ("oar", "#OAR -l /nodes=1/core=4,walltime=2", 7200),
        ("htcondor", "RequestCpus = 1", None),
    ],
)
def test_a_job_scripts_walltime_is_read_as_its_system_means_it(
    system: str, line: str, seconds: float | None
) -> None:
    assert SYSTEMS[system].walltime_of(f"#!/bin/sh\n{line}\n") == seconds


def test_a_walltime_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^expected a walltime such as 02:00:00, got 'soon': set"):
        SYSTEMS["slurm"].walltime_of("#SBATCH -t soon")


def test_jobs_that_end_too_soon_are_refused_before_and_after_they_have_begun() -> None:
    check_runtime(3600, 600, {})
    check_runtime(3600, 600, {"tcp://a": 10.0, "tcp://b": 3000.0})
    with pytest.raises(ValueError, match=r"got a walltime of 300 s: ask for a longer walltime"):
        check_runtime(300, 600, {})
    with pytest.raises(ValueError, match=r"that has run for 3001 s already \(tcp://b\): ask for"):
        check_runtime(3600, 600, {"tcp://a": 10.0, "tcp://b": 3001.0})


def test_states_and_reasons_of_slurm_are_its_own_words() -> None:
    answer = (
        "7|PENDING|Resources|0|/logs/worker-%J.err   \n"
        "8|RUNNING|None|0|/logs/worker-8.err   \n"
        "9|FAILED|NonZeroExitCode|32512|N/A   \n"
    )
    assert slurm_states(answer, "", ["7", "8", "9"]) == [
        JobState("7", "PENDING (Resources)", log=Path("/logs/worker-7.err")),
        JobState("8", "RUNNING", log=Path("/logs/worker-8.err")),
        JobState("9", "FAILED (NonZeroExitCode), exit code 127", ended=True),
    ]


def test_a_job_that_slurm_has_forgotten_has_ended_but_not_one_that_it_can_not_tell_of() -> None:
    (gone,) = slurm_states("", "slurm_load_jobs error: Invalid job id specified", ["7"])
    assert gone == JobState("7", "unknown to the queue (any more)", ended=True)
    (silent,) = slurm_states("", "slurm_load_jobs error: Unable to contact controller", ["7"])
    assert silent == JobState("7", "slurm_load_jobs error: Unable to contact controller")


@pytest.mark.parametrize(
    ("system", "answer", "words"),
    [
        (
            "pbs",
            "Job Id: 7.server\n    Job_Name = dask-worker\n    job_state = Q\n"
            "    comment = Not Running: no node has 64 ncpus\n    queue = workq\n",
            "job_state = Q; comment = Not Running: no node has 64 ncpus",
        ),
        (
            "lsf",
            "PEND  -  New job is waiting for scheduling;\n",
            "PEND - New job is waiting for scheduling;",
        ),
    ],
)
def test_of_other_systems_the_telling_lines_are_passed_on(
    system: str, answer: str, words: str
) -> None:
    assert state_of(SYSTEMS[system], "7", answer, "") == JobState("7", words)
    assert state_of(SYSTEMS[system], "7", "", "no server answers") == JobState(
        "7", "no server answers"
    )


@pytest.mark.parametrize(
    ("system", "answer", "trouble"),
    [
        ("pbs", "Job Id: 7.server\n    job_state = F\n    comment = Job run at noon\n", ""),
        ("pbs", "", "qstat: Unknown Job Id 7.server"),
        ("pbs", "", "qstat: 7.server Job has finished, use -x or -H to obtain job information"),
        ("sge", "Following jobs do not exist:\n7\n", ""),
        ("lsf", "EXIT  TERM_OWNER: job killed by owner  -\n", ""),
        ("lsf", "", "Job <7> is not found"),
        ("oar", "Job_Id: 7\n    state = Error\n    message = the walltime is over\n", ""),
        ("htcondor", "Total for query: 0 jobs; 0 completed, 0 removed, 0 idle, 0 running\n", ""),
    ],
)
def test_of_other_systems_it_is_known_when_a_job_has_ended(
    system: str, answer: str, trouble: str
) -> None:
    state = state_of(SYSTEMS[system], "7", answer, trouble)
    assert state.ended
    assert state.words


def test_a_queue_without_its_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for system in SYSTEMS:
        (state,) = asyncio.run(states_of(system, ["7"]))
        assert "can't be run: No such file or directory" in state.words
        assert not state.ended


def test_a_jobs_last_words_are_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\n\nthree\nfour\n\n")
    assert JobState("7", "FAILED", log=log).last_lines() == "two\nthree\nfour"
    assert JobState("7", "FAILED", log=tmp_path / "elsewhere").last_lines() == ""
    assert JobState("7", "FAILED").last_lines() == ""
