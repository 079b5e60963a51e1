"""What a queue says of jobs, in its own words: one command for each queueing system."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ANSWER_S = 10.0
"""A queue that has not answered for so long is taken to be silent."""

ASK_S = 2.0
"""A queue is asked about its jobs so often: queues do not like to be asked."""

LOG_LINES = 3
"""Of what a job that has failed wrote last."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What the queue says of a job.

    Attributes
    ----------
    job : str
        The queue's number for it.
    words : str
        In the queue's own words, such as ``PENDING (Resources)``.
    ended : bool
        Whether it surely runs no more, and never will again.
    log : Path or None
        Where its errors go to, where the queue tells.
    """

    job: str
    words: str
    ended: bool = False
    log: Path | None = None

    def __str__(self) -> str:
        return f"job {self.job}: {self.words}"

    def last_lines(self) -> str:
        """Return what it wrote last, as far as this machine sees the file; else nothing.

        Returns
        -------
        str
            Lines of its log.
        """
        if self.log is None:
            return ""
        with suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()
            return "\n".join([line for line in lines if line.strip()][-LOG_LINES:])
        return ""


@dataclass(frozen=True, slots=True)
class QueueSystem:
    """How to speak with a queueing system.

    Attributes
    ----------
    cluster : str
        The class of dask_jobqueue that submits to it.
    ask : tuple of str
        The command that tells of a job, whose number comes last.
    telling : str
        A pattern of the lines of its answer that say how the job is, and why.
    ended : str
        A pattern of what it says, or complains of, once a job surely runs no more.
    walltime : str
        A pattern of the job script's line that sets the walltime, which is its first group.
    units : mapping of int to sequence of int
        By its number of parts between colons, the seconds that a walltime's parts stand for.
    days : bool
        Whether days may stand before them, as in ``1-12:00:00``.
    example : str
        A walltime of two hours, as it is written here.
    exclusive : mapping of str to str or sequence of str
        The options of dask_jobqueue's class by which a job has its node to itself; empty where
        that is for the site to name.
    """

    cluster: str
    ask: tuple[str, ...]
    telling: str
    ended: str
    walltime: str
    units: Mapping[int, Sequence[int]]
    days: bool = False
    example: str = "02:00:00"
    exclusive: Mapping[str, str | Sequence[str]] = field(default_factory=dict)

    def walltime_of(self, script: str) -> float | None:
        """Return the walltime that a job script asks for, in seconds; None where it is not told.

        Raises
        ------
        ValueError
            If it can't be read.
        """
        found = re.findall(self.walltime, script, re.MULTILINE)
        return self.seconds_of(found[-1]) if found else None  # a later line of a script wins

    def seconds_of(self, walltime: str) -> float:
        """Return the seconds that a walltime stands for.

        Raises
        ------
        ValueError
            If the queue would not take it.
        """
        if not self.units:
            raise ValueError(f"expected no walltime, which {self.cluster} does not have: leave it")
        days, _, rest = walltime.rpartition("-") if self.days else ("", "", walltime)
        parts = rest.split(":")
        units = (3600, 60, 1)[: len(parts)] if days else self.units.get(len(parts), ())
        try:
            seconds = [int(part) * unit for part, unit in zip(parts, units, strict=True)]
            return 86_400.0 * int(days or 0) + sum(seconds)
        except ValueError:
            raise ValueError(
                f"expected a walltime such as {self.example}, got {walltime!r}: set it by walltime="
            ) from None


_CLOCK = {1: (1,), 2: (60, 1), 3: (3600, 60, 1)}
_SQUEUE = "JobID:|,State:|,Reason:|,exit_code:|,STDERR:1000"
_SLURM_ENDED = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
        *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
    )
)

SYSTEMS: Mapping[str, QueueSystem] = {
    "slurm": QueueSystem(
        cluster="SLURMCluster",
        ask=("squeue", "--states=all", "--noheader", f"--Format={_SQUEUE}", "--jobs"),
        telling="",
        ended=r"(?!)",  # told by the states themselves
        walltime=r"^#SBATCH (?:-t|--time)[ =](\S+)",
        units={1: (60,), 2: (60, 1), 3: (3600, 60, 1)},
        days=True,
        exclusive={"job_extra_directives": ["--exclusive"]},
    ),
    "pbs": QueueSystem(
        cluster="PBSCluster",
        ask=("qstat", "-f"),
        telling=r"job_state|comment",
        ended=r"job_state = [CF]\b|Unknown Job Id|Job has finished",
        walltime=r"^#PBS -l .*\bwalltime=([^\s,]+)",
        units=_CLOCK,
        exclusive={"job_extra_directives": ["-l place=excl"]},
    ),
    "sge": QueueSystem(
        cluster="SGECluster",
        ask=("qstat", "-j"),
        telling=r"scheduling info|error reason|job_state",
        ended=r"do not exist",
        walltime=r"^#\$ -l .*\bh_rt=([^\s,]+)",
        units=_CLOCK,
    ),
    "lsf": QueueSystem(
        cluster="LSFCluster",
        ask=("bjobs", "-noheader", "-o", "stat exit_reason pend_reason"),
        telling="",
        ended=r"^(?:EXIT|DONE)\b|is not found",
        walltime=r"^#BSUB -W (\S+)",
        units={1: (60,), 2: (3600, 60)},
        example="02:00",
        exclusive={"job_extra_directives": ["-x"]},
    ),
    "oar": QueueSystem(
        cluster="OARCluster",
        ask=("oarstat", "-f", "-j"),
        telling=r"\b(?:state|message)\b",
        ended=r"\bstate = (?:Error|Terminated)\b",
        walltime=r"^#OAR -l .*\bwalltime=([^\s,]+)",
        units={1: (3600,), 2: (3600, 60), 3: (3600, 60, 1)},
        exclusive={"resource_spec": "/nodes=1"},
    ),
    "htcondor": QueueSystem(
        cluster="HTCondorCluster",
        ask=("condor_q", "-nobatch"),
        telling="",
        ended=r"Total for query: 0 jobs",
        walltime=r"(?!)",  # it has none
        units={},
    ),
}
"""By the name under which dask-jobqueue keeps its settings."""


async def states_of(system: str, jobs: Sequence[str]) -> list[JobState]:
    """Ask a queue about jobs.

    Parameters
    ----------
    system : str
        A key of `SYSTEMS`. Of another one nothing is known.
    jobs : sequence of str
        Their numbers.
    """
    if not jobs or system not in SYSTEMS:
        return [JobState(job, "submitted") for job in jobs]
    queue = SYSTEMS[system]
    if system == "slurm":
        return slurm_states(*await _answer((*queue.ask, ",".join(jobs))), jobs)
    answers = await asyncio.gather(*(_answer((*queue.ask, job)) for job in jobs))
    return [state_of(queue, job, *answer) for job, answer in zip(jobs, answers, strict=True)]


def slurm_states(answer: str, trouble: str, jobs: Sequence[str]) -> list[JobState]:
    """Read what ``squeue`` has answered, and what it has complained of."""
    found: dict[str, JobState] = {}
    for line in answer.splitlines():
        job, state, reason, code, log = line.rstrip().split("|")
        words = state if reason in ("None", "") else f"{state} ({reason})"
        if state == "FAILED":
            # squeue shows the status as the system has it: the code is in its upper byte.
            words += f", exit code {int(code) >> 8 or code if code.isdigit() else code}"
        path = None if log == "N/A" else Path(log.replace("%j", job).replace("%J", job))
        found[job] = JobState(job, words, state in _SLURM_ENDED, path)
    # A single job that is gone is an error of the command; among others it is left out.
    gone = not trouble or "Invalid job id" in trouble
    words = "unknown to the queue (any more)" if gone else trouble
    return [found.get(job, JobState(job, words, ended=gone)) for job in jobs]


def state_of(queue: QueueSystem, job: str, answer: str, trouble: str) -> JobState:
    """Pick what tells of a job from what its queue's command has answered, or complained of."""
    lines = [" ".join(line.split()) for line in answer.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(queue.telling, line)]
    ended = any(re.search(queue.ended, line) for line in (*lines, trouble))
    words = "; ".join(telling or lines[-LOG_LINES:]) or trouble or "submitted"
    return JobState(job, words, ended)


async def _answer(command: Sequence[str]) -> tuple[str, str]:
    """Return what a command says, and what it complains of."""
    try:
        asked = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return "", f"{command[0]} can't be run: {error.strerror}"
    try:
        said, complained = await asyncio.wait_for(asked.communicate(), ANSWER_S)
    except TimeoutError:
        return "", f"{command[0]} has not answered within {ANSWER_S:g} s"
    finally:
        if asked.returncode is None:
            asked.kill()
    trouble = " ".join(complained.decode(errors="replace").split())
    return said.decode(errors="replace"), trouble if asked.returncode else ""
