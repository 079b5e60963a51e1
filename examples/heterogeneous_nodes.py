"""Share the layers out by what each node can hold and compute.

Start workers on nodes of any kind, such as a large and a small one, and give this the scheduler's
address. Each worker measures a layer of the model; faster ones get more layers, as far as their
memory goes.

Usage::

    .venv/bin/dask scheduler --scheduler-file cluster.json
    .venv/bin/dask worker --scheduler-file cluster.json --nthreads 32 --memory-limit 0
    .venv/bin/dask worker --scheduler-file cluster.json --nthreads 8 --memory-limit 16GB
    .venv/bin/python examples/heterogeneous_nodes.py tcp://10.0.0.1:8786
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask import hpc


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scheduler", help="its address")
    parser.add_argument("prompt", nargs="?", default="def main")
    parser.add_argument("--stages", type=int, default=2)
    asked = parser.parse_args(arguments)

    target, _ = pi.demo_pair()
    with (
        Client(asked.scheduler) as client,
        hpc.engine_from(
            client, target, "ngram", stages=asked.stages, layer_split="auto", start_timeout=60
        ) as engine,
    ):
        for node, place in engine.nodes.items():
            print(f"{node}: {place}")
        print(engine.generate(asked.prompt).text)


if __name__ == "__main__":
    main()
