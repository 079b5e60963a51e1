"""The examples run as they stand; those for a job queue print what they would submit."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from distributed.security import Security

import pipeinfer_dask as pi
from tests.clusters import local_cluster

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Callable[[Sequence[str]], None]:
    main: Callable[[Sequence[str]], None] = runpy.run_path(str(EXAMPLES / name))["main"]
    return main


@pytest.fixture(scope="module")
def plain() -> str:
    """Return what the target says after the examples' prompt."""
    with pi.Engine.from_pretrained(pi.demo_pair()[0], in_process=True) as engine:
        return engine.generate("def main").text


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write an authority, a certificate and a key, as an administrator hands them out."""
    folder = tmp_path_factory.mktemp("tls")
    made = Security.temporary().get_tls_config_for_role("client")
    paths = {name: folder / f"{name}.pem" for name in ("ca_file", "cert", "key")}
    for name, path in paths.items():
        path.write_text(made[name])
    return paths


@pytest.mark.parametrize(
    ("name", "directives"),
    [
        (
            "slurm.py",
            [
                "#SBATCH --cpus-per-task=1",
                "#SBATCH --mem=2G",
                "#SBATCH -t 01:00:00",
                "#SBATCH --exclusive",
            ],
        ),
        (
            "pbs.py",
            [
                "#PBS -q workq",
                "#PBS -l select=1:ncpus=16:mem=64GB",
                "#PBS -l walltime=02:00:00",
                "#PBS -l place=excl",
                "module load python",
            ],
        ),
    ],
)
def test_an_examples_job_script_is_shown_and_nothing_is_submitted(
    name: str,
    directives: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where dask-jobqueue makes the logs' folder
    example(name)(["--job-script", "--queue", "workq"])
    script = capsys.readouterr().out
    assert set(directives) <= set(script.splitlines())
    assert " --memory-limit 0" in script


@pytest.mark.cluster
def test_the_example_of_an_existing_scheduler_speaks_tls_alone(
    plain: str, certificates: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ca, cert, key = (str(certificates[name]) for name in ("ca_file", "cert", "key"))
    roles = {
        f"tls_{role}_{kind}": path
        for role in ("scheduler", "worker", "client")
        for kind, path in (("cert", cert), ("key", key))
    }
    security = Security(tls_ca_file=ca, require_encryption=True, **roles)
    with local_cluster(n_workers=3, protocol="tls://", security=security) as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        assert all(worker.address.startswith("tls://") for worker in cluster.workers.values())
        example("existing_scheduler_tls.py")(
            [address, "--ca-file", ca, "--cert", cert, "--key", key]
        )
    assert capsys.readouterr().out == plain + "\n"


@pytest.mark.cluster
def test_the_example_of_unlike_nodes_shares_out_all_layers(
    plain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with local_cluster(n_workers=2, protocol="tcp://") as cluster:
        example("heterogeneous_nodes.py")([cluster.scheduler_address])
    *nodes, text = capsys.readouterr().out.split("\n", 4)
    drafter, head, first, second = sorted(nodes)
    assert drafter == "drafter (ngram): a thread of this process"
    assert head == "head: client"
    assert first.startswith("stage 0 (layers 0 to ")
    assert " to 5): " in second and second.startswith("stage 1 ")
    assert text == plain + "\n"
