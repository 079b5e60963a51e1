"""Generate on the ranks of an MPI job: rank 0 is the scheduler, rank 1 this program.

All other ranks are workers: one for each stage, and one for the draft model. Needs
``.venv/bin/pip install -c constraints.txt '.[hpc]'``, beside the MPI that starts it.

Usage::

    mpirun -n 5 .venv/bin/python examples/mpi.py --stages 2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import dask_mpi
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask import hpc


def main(arguments: Sequence[str] | None = None) -> None:
    target, draft = pi.demo_pair()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="def main")
    parser.add_argument("--target", default=target, help="a directory that all nodes see")
    parser.add_argument("--draft", default=draft)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--interface", help="the network, such as ib0")
    asked = parser.parse_args(arguments)

    # Returns on rank 1 alone, and ends all ranks with this program.
    dask_mpi.initialize(
        interface=asked.interface, nthreads=asked.threads, memory_limit=0, dashboard=False
    )
    with (
        Client() as client,
        hpc.engine_from(client, asked.target, asked.draft, stages=asked.stages) as engine,
    ):
        print(engine.generate(asked.prompt).text)


if __name__ == "__main__":
    main()
