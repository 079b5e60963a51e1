"""Generate through jobs of a Slurm queue: one for each stage, one for the draft model, spares.

Run it where jobs can be submitted and their nodes can connect to: mostly a login node, or a
job of its own. ``--job-script`` prints what would be submitted, and submits nothing.

Usage::

    .venv/bin/python examples/slurm.py --queue normal --cores 32 --memory "64 GB" --interface ib0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pipeinfer_dask as pi
from pipeinfer_dask import hpc


def main(arguments: Sequence[str] | None = None) -> None:
    target, draft = pi.demo_pair()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="def main")
    parser.add_argument("--target", default=target, help="a directory that all nodes see")
    parser.add_argument("--draft", default=draft)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--spares", type=int, default=0, help="jobs that wait for one to be lost")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--queue", help="the partition; by default the queue's own")
    parser.add_argument("--account")
    parser.add_argument("--cores", type=int, default=1, help="of each job")
    parser.add_argument("--memory", default="2 GB", help="of each job")
    parser.add_argument("--walltime", default="01:00:00", help="of each job")
    parser.add_argument("--interface", help="the network, such as ib0")
    parser.add_argument("--log-directory", default="logs", help="where jobs write their errors")
    parser.add_argument("--job-script", action="store_true", help="print it, and end")
    asked = parser.parse_args(arguments)

    with hpc.job_cluster(
        "slurm",
        queue=asked.queue,
        account=asked.account,
        cores=asked.cores,
        memory=asked.memory,
        walltime=asked.walltime,
        interface=asked.interface,
        log_directory=asked.log_directory,
    ) as cluster:
        if asked.job_script:
            print(cluster.job_script())
            return
        with hpc.engine_from(
            cluster,
            asked.target,
            asked.draft,
            stages=asked.stages,
            spares=asked.spares,
            progress=True,
        ) as engine:
            for node, place in engine.nodes.items():
                print(f"{node}: {place}", file=sys.stderr)
            for piece in engine.start(asked.prompt, max_new_tokens=asked.new_tokens):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
