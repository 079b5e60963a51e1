"""A real Slurm on this machine, for any user: a controller, and four nodes that are one host.

python -m tests.hpc.slurm       # runs one until Ctrl-C, to try things by hand
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
FOLDERS = ("/usr/sbin", "/usr/local/sbin")
"""Where daemons are that are not on everybody's path."""
NODES = ("one", "two", "three", "four")
"""For three jobs that have a node each, and one for another in the place of one that is ending."""
CORES = 4
PATIENCE_S = 120.0
"""How long anything may take here, on a machine that does much else."""

CONFIGURATION = """\
ClusterName=pipeinfer
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=2
PartitionName=debug Nodes=ALL Default=YES MaxTime=120 State=UP
"""
USAGE = """\
A Slurm with {nodes} nodes of {cores} cores, until Ctrl-C. In another terminal:

export SLURM_CONF={configuration}
sinfo
python examples/slurm.py --interface lo --memory '1 GB' --log-directory {folder}/logs

"""
NODE = """\
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} RealMemory=16000
"""


def program(name: str) -> str | None:
    """Return where a program is, also a daemon; None if nowhere."""
    return shutil.which(name, path=os.pathsep.join((os.environ["PATH"], *FOLDERS)))


def lacking() -> str | None:
    """Say what is missing for a Slurm here; None if nothing is."""
    missing = [name for name in PROGRAMS if program(name) is None]
    if not missing:
        return None
    return f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge"


class Slurm:
    """Runs while it is entered; clients find it by ``SLURM_CONF``."""

    def __init__(self) -> None:
        # A socket's path is short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munged wants its socket to be open to all
        self.configuration = self.folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self._end)
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            jobs = self.say("squeue", "--noheader", "--format=%A").split()
            if jobs:
                self.say("scancel", *jobs)
                until(lambda: not self.say("squeue", "--noheader"), "jobs that end")
        finally:
            self._end()

    def say(self, *command: str) -> str:
        """Run one of Slurm's commands, and return its answer."""
        environment = os.environ | {"SLURM_CONF": str(self.configuration)}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE_S
        ).stdout

    @contextmanager
    def starting_nothing_until(self, holds: Callable[[], bool]) -> Iterator[None]:
        """Have new jobs wait until something holds; those that run go on."""

        def open_again() -> None:
            try:
                until(holds, "what jobs are held back for")
            finally:
                self.say("scontrol", "update", "PartitionName=debug", "State=UP")

        self.say("scontrol", "update", "PartitionName=debug", "State=DOWN")
        with ThreadPoolExecutor(1) as pool:
            opened = pool.submit(open_again)
            yield
            opened.result()

    def _start(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        first, *others = free_ports(1 + len(NODES))
        nodes = [
            NODE.format(node=node, host=host, port=port, cores=CORES)
            for node, port in zip(NODES, others, strict=True)
        ]
        self.configuration.write_text(
            CONFIGURATION.format(host=host, port=first, user=getpass.getuser(), folder=self.folder)
            + "".join(nodes)
        )
        munge = self.folder / "munge"
        files = (f"--{name}-file={munge}.{name}" for name in ("pid", "log", "seed"))
        self._run("munged", "--foreground", f"--key-file={key}", f"--socket={munge}.socket", *files)
        until(lambda: self._up(Path(f"{munge}.socket").exists), "a socket of munged")
        self._run("slurmctld", "-D", "-i")
        for node in NODES:
            self._run("slurmd", "-D", "-N", node)
        until(lambda: self._up(self._idle), f"{len(NODES)} nodes of Slurm that are idle")

    def _up(self, stands: Callable[[], bool]) -> bool:
        """Return whether something stands by now, as long as no daemon has ended."""
        for number, daemon in enumerate(self._daemons):
            if daemon.poll() is not None:
                (log,) = self.folder.glob(f"*-{number}.log")
                raise RuntimeError(f"{log.stem} has ended: {log.read_text()[-2000:]}")
        return stands()

    def _idle(self) -> bool:
        try:
            states = self.say("sinfo", "--noheader", "--Node", "--format=%T").split()
        except subprocess.CalledProcessError:
            return False  # nobody answers yet
        return states == ["idle"] * len(NODES)

    def _run(self, *command: str) -> None:
        path = program(command[0])
        assert path is not None
        log = (self.folder / f"{command[0]}-{len(self._daemons)}.log").open("wb")
        with log:
            self._daemons.append(
                subprocess.Popen(
                    [path, *command[1:]],
                    env=os.environ | {"SLURM_CONF": str(self.configuration)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for us alone, who end them in order
                )
            )

    def _end(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for another process; nothing tells of what it does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what} within {PATIENCE_S:g} s"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody has now."""
    with ExitStack() as held:
        taken = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [port.getsockname()[1] for port in taken]


def main() -> None:
    """Run a Slurm until Ctrl-C, and say how to use it."""
    if (missing := lacking()) is not None:
        raise SystemExit(missing)
    for ending in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(ending, signal.default_int_handler)
    with suppress(KeyboardInterrupt), Slurm() as slurm:
        (slurm.folder / "logs").mkdir()
        sys.stdout.write(
            USAGE.format(
                nodes=len(NODES),
                cores=CORES,
                configuration=slurm.configuration,
                folder=slurm.folder,
            )
        )
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main()
