"""Generate on a cluster that is already running, and that speaks TLS only.

The scheduler and its workers may have been started by ``dask ssh``, ``dask-mpi``, an
administrator or a container platform. The links between stages use the same certificates
and the workers' own ports.

Usage::

    .venv/bin/python examples/existing_scheduler_tls.py tls://10.0.0.1:8786 \
        --ca-file ca.pem --cert cert.pem --key key.pem
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distributed import Client
from distributed.security import Security

import pipeinfer_dask as pi
from pipeinfer_dask import hpc


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scheduler", help="its address")
    parser.add_argument("prompt", nargs="?", default="def main")
    parser.add_argument("--ca-file", required=True)
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--stages", type=int, default=2)
    asked = parser.parse_args(arguments)

    security = Security(
        tls_ca_file=asked.ca_file,
        tls_client_cert=asked.cert,
        tls_client_key=asked.key,
        require_encryption=True,
    )
    target, draft = pi.demo_pair()
    with (
        Client(asked.scheduler, security=security) as client,
        hpc.engine_from(client, target, draft, stages=asked.stages, start_timeout=60) as engine,
    ):
        print(engine.generate(asked.prompt).text)


if __name__ == "__main__":
    main()
