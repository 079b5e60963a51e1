"""Generate on machines that SSH reaches: the scheduler on the first, a worker on each further one.

A machine may be named twice. Needs ``.venv/bin/pip install -c constraints.txt '.[hpc]'`` here, and
this package on each of them, at the same place.

Usage::

    .venv/bin/python examples/ssh.py node1 node1 node2 node3 --remote-python /shared/venv/bin/python
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distributed import SSHCluster

import pipeinfer_dask as pi
from pipeinfer_dask import hpc


def main(arguments: Sequence[str] | None = None) -> None:
    target, draft = pi.demo_pair()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="+", help="the scheduler's, then one for each worker")
    parser.add_argument("--prompt", default="def main")
    parser.add_argument("--target", default=target, help="a directory that all nodes see")
    parser.add_argument("--draft", default=draft)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--remote-python", help="the Python to run there; by default as here")
    parser.add_argument("--port", type=int, default=22, help="of SSH")
    parser.add_argument("--key", help="a private key; by default those of ~/.ssh")
    parser.add_argument("--known-hosts", help="by default ~/.ssh/known_hosts")
    asked = parser.parse_args(arguments)

    connect: dict[str, object] = {"port": asked.port}
    if asked.key is not None:
        connect["client_keys"] = [asked.key]
    if asked.known_hosts is not None:
        connect["known_hosts"] = asked.known_hosts
    with (
        SSHCluster(
            asked.hosts,
            connect_options=connect,
            worker_options={"nthreads": asked.threads, "memory_limit": "0"},
            scheduler_options={"port": 0, "dashboard": False},
            remote_python=asked.remote_python,
        ) as cluster,
        hpc.engine_from(
            cluster, asked.target, asked.draft, stages=asked.stages, start_timeout=90
        ) as engine,
    ):
        print(engine.generate(asked.prompt).text)


if __name__ == "__main__":
    main()
