"""Generate through jobs of a PBS queue, and show beforehand what is submitted.

Other systems differ in the name alone: ``"sge"``, ``"lsf"``, ``"oar"`` or ``"htcondor"``.

Usage::

    .venv/bin/python examples/pbs.py --job-script
    .venv/bin/python examples/pbs.py --queue workq --account project1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pipeinfer_dask as pi
from pipeinfer_dask import hpc


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="def main")
    parser.add_argument("--queue")
    parser.add_argument("--account")
    parser.add_argument("--job-script", action="store_true", help="print it, and end")
    asked = parser.parse_args(arguments)

    with hpc.job_cluster(
        "pbs",
        queue=asked.queue,
        account=asked.account,
        cores=16,
        memory="64 GiB",
        walltime="02:00:00",
        local_directory="$TMPDIR",  # a disk of the node's own
        job_script_prologue=["module load python"],
        log_directory="logs",
    ) as cluster:
        if asked.job_script:
            print(cluster.job_script())
            return
        target, draft = pi.demo_pair()
        with hpc.engine_from(
            cluster, target, draft, stages=4, spares=1, start_timeout="2 hours", progress=True
        ) as engine:
            print(engine.generate(asked.prompt).text)


if __name__ == "__main__":
    main()
