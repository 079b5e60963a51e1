"""An engine tells how far its models are, and asks what its workers can do before they load."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.engine import Loading
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.stage import StageOutput
from pipeinfer_dask.models.tensors import stored_tensors
from pipeinfer_dask.runtime.planning.clusters import own_cluster
from tests.clusters import client_of
from tests.engine.pairs import LAYERS, PROMPT, Pair


@pytest.fixture(params=["in-process", pytest.param("inproc", marks=pytest.mark.cluster)])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "in-process":
        return {"in_process": True}
    return {"client": request.getfixturevalue("inproc_client")}


def test_every_node_tells_the_bytes_that_it_reads_and_when_it_stands(
    pair: Pair, where: dict[str, Any]
) -> None:
    steps: list[Loading] = []
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=2, progress=steps.append, **where
    ):
        pass
    last = {step.node.partition(" (")[0]: step for step in steps}
    assert last.keys() == {"stage 0", "stage 1", "drafter"}
    assert all(step.stands and step.nbytes == step.total for step in last.values())
    assert sum(step.stands for step in steps) == 3
    stored = sum(tensor.nbytes for tensor in stored_tensors(pair.target).values())
    assert last["stage 0"].total + last["stage 1"].total == stored


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_bar_is_shown_to_those_who_ask_for_one(
    pair: Pair, progress: bool | None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pi.Engine.from_pretrained(pair.target, stages=1, in_process=True, progress=progress):
        pass
    assert ("loading" in capfd.readouterr().err) is (progress is True)


def test_progress_that_raises_is_told_no_more_and_keeps_no_model_from_loading(
    pair: Pair, where: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Loading] = []

    def progress(step: Loading) -> None:
        told.append(step)
        raise KeyError("bar")

    with pi.Engine.from_pretrained(
        pair.target, pair.draft, stages=2, progress=progress, **where
    ) as engine:
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids == pair.greedy[:20]
    assert len(told) == 1
    assert [
        record.getMessage() for record in caplog.records if "KeyError" in record.getMessage()
    ] == ["progress is told no more, for it has raised KeyError: 'bar'"]


def test_progress_that_can_not_be_told_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="progress as a callable, True, False or None, got 'yes'"):
        pi.Engine.from_pretrained(pair.target, progress="yes")  # type: ignore[arg-type]


@pytest.mark.cluster
def test_workers_are_measured_and_share_the_layers_out(pair: Pair, inproc_client: Client) -> None:
    with pi.Engine.from_pretrained(
        pair.target, pair.draft, client=inproc_client, stages=3, layer_split="auto"
    ) as engine:
        assert [n for layers in engine.layer_ranges for n in layers] == list(range(LAYERS))
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids == pair.greedy[:20]


@contextmanager
def slowed(client: Client, worker: str, times: int) -> Iterator[None]:
    """Have a worker compute every pass so many times: its results are the same, only later."""

    def begin() -> None:
        run = Shard.run

        def again(shard: Shard, *args: Any, **options: Any) -> StageOutput:
            for _ in range(times - 1):
                run(shard, *args, **options)
            return run(shard, *args, **options)

        Shard.run, Shard.once = again, run  # type: ignore[assignment, method-assign, attr-defined]

    def end() -> None:
        Shard.run = Shard.once  # type: ignore[method-assign, attr-defined]

    client.run(begin, workers=[worker])
    try:
        yield
    finally:
        client.run(end, workers=[worker])


@pytest.mark.cluster
def test_a_slow_worker_gets_fewer_layers_whichever_it_is() -> None:
    target, _ = pi.demo_pair()
    texts = set()
    with ExitStack() as resources:
        client = own_cluster(2, resources)
        for slow in client.scheduler_info(n_workers=-1)["workers"]:
            steps: list[Loading] = []
            with (
                slowed(client, slow, times=20),
                pi.Engine.from_pretrained(
                    target, client=client, stages=2, layer_split="auto", progress=steps.append
                ) as engine,
            ):
                where = {step.node.partition(" (")[0]: step.where for step in steps}
                for index, layers in enumerate(engine.layer_ranges):
                    assert len(layers) == (1 if where[f"stage {index}"] == slow else 5)
                texts.add(engine.generate("def main", max_new_tokens=16).text)
    with pi.Engine.from_pretrained(target, in_process=True) as plain:
        assert texts == {plain.generate("def main", max_new_tokens=16).text}


def test_stages_of_one_process_share_alike_but_for_the_head(pair: Pair) -> None:
    with pi.Engine.from_pretrained(
        pair.target, stages=3, layer_split="auto", in_process=True
    ) as engine:
        # The head weighs 1.3 layers: the last stage has one layer to go with it.
        assert [len(layers) for layers in engine.layer_ranges] == [2, 1, 1]


@pytest.mark.cluster
def test_a_worker_that_can_not_measure_is_named(
    pair: Pair, inproc_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeinfer_dask.models.probe.ROUNDS", 0)
    with pytest.raises(RuntimeError, match=r"worker inproc://.* could not measure a layer: Value"):
        pi.Engine.from_pretrained(pair.target, client=inproc_client, stages=2, layer_split="auto")


@pytest.mark.cluster
def test_a_worker_whose_limit_is_too_low_is_refused_before_it_loads(
    pair: Pair, inproc_client: Client
) -> None:
    # These workers are threads of this process, which takes more than that by itself.
    with client_of(1, memory_limit="100 MiB", loop=inproc_client.loop) as client:
        (worker,) = client.scheduler_info()["workers"]
        match = (
            rf"for stage 0 on {worker}, got 0.00 MiB \(memory_limit of worker {worker}\): use more"
        )
        with pytest.raises(MemoryError, match=match):
            pi.Engine.from_pretrained(pair.target, client=client, stages=1)
        assert client.run(lambda dask_worker: len(dask_worker.state.actors)) == {worker: 0}


@pytest.mark.cluster
def test_weights_that_a_worker_lacks_are_named_with_the_worker(
    pair: Pair, tmp_path: Path, inproc_client: Client
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(pair.target, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(
        FileNotFoundError, match=rf"worker inproc.* finds no model: {bare} holds no model"
    ):
        pi.Engine.from_pretrained(bare, client=inproc_client, stages=1)
