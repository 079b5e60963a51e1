"""Who computes on which device, and what a worker lacks is told before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeinfer_dask.engine import Engine
from pipeinfer_dask.models.checkpoint import open_checkpoint
from pipeinfer_dask.models.demo_pair import demo_pair
from pipeinfer_dask.models.probe import cache_width
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.runtime.planning.admission import SPECULATIVE_SLOTS
from pipeinfer_dask.runtime.planning.gpus import CPUS, Devices, check_gpus, gpu_count
from pipeinfer_dask.runtime.planning.memory import Pool
from pipeinfer_dask.runtime.planning.models import Models
from tests.families import FAMILIES
from tests.models.pipelines import linear, never
from tests.tiny import make_tiny

no_gpu = pytest.mark.skipif(gpu_count() > 0, reason="says what a machine without a GPU says")


def of(devices: Any = None, draft: Any = None, dtype: Any = None) -> Devices:
    return Devices.of(devices, draft, dtype, cuda_graphs=False)


def test_by_default_all_is_on_cpus() -> None:
    assert of() == CPUS
    assert CPUS.for_stages(3) == ("cpu", "cpu", "cpu")
    assert not CPUS.on_gpus and not CPUS.own_gpus


def test_one_device_stands_for_all_stages_and_the_draft_goes_where_the_last_stage_is() -> None:
    asked = of("cuda")
    assert asked.for_stages(2) == ("cuda", "cuda")
    assert asked.draft == "cuda"
    assert asked.own_gpus
    mixed = of(["cpu", "cuda:0", "cuda:1"])
    assert (mixed.draft, mixed.on_gpus, mixed.own_gpus) == ("cuda:1", True, False)
    assert of("cuda:0,cpu") == of(["cuda:0", "cpu"])
    assert of("cuda", draft="cpu").draft == "cpu"


@pytest.mark.parametrize("devices", [[], 3, {"cpu": 1}, ["cpu", "tpu"], "cpu,,cpu", [0]])
def test_devices_that_are_none_are_refused(devices: object) -> None:
    with pytest.raises(ValueError, match=r"^expected (devices as|a device as)"):
        of(devices)


def test_as_many_devices_as_stages_or_one() -> None:
    with pytest.raises(ValueError, match=r"^expected a device for each of 3 stages, or one for"):
        of(["cpu", "cuda"]).for_stages(3)


def test_16_bits_are_for_gpus() -> None:
    with pytest.raises(ValueError, match=r"^expected dtype='float32' for stages on a CPU, got 'fl"):
        of(["cpu", "cuda"], dtype="float16")
    with pytest.raises(ValueError, match=r"^expected dtype to be one of 'float32', 'float16', "):
        of("cuda", dtype="fp16")
    assert of("cuda", draft="cpu", dtype="float16").dtype == "float16"


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        (torch.float32, "float32"),
        (torch.float16, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float64, "float32"),
    ],
)
def test_a_gpu_computes_in_what_the_checkpoint_is_stored_in(
    stored: torch.dtype, own: str, tmp_path: Path
) -> None:
    model = open_checkpoint(make_tiny(tmp_path, "llama", layers=1, seed=1, dtype=stored))
    assert of("cuda").dtype_of(model, "cuda") == own
    assert of("cuda").dtype_of(model, "cpu") == "float32"
    assert of("cuda", dtype="bfloat16").dtype_of(model, "cuda") == "bfloat16"
    # What is told where no file is.
    (tmp_path / "model.safetensors").unlink()
    told = open_checkpoint(tmp_path, elsewhere=True).dtype
    assert told == json.loads((tmp_path / "config.json").read_text())["dtype"] or own == "float32"


def test_a_worker_without_the_gpu_is_named_and_what_it_has() -> None:
    nodes = [("stage 0", "a", "cuda:1"), ("stage 1", "b", "cuda")]
    check_gpus(nodes, {"a": 2, "b": 1})
    with pytest.raises(ValueError, match=r"^expected cuda:1 for stage 0 on a, got cuda:0: name a"):
        check_gpus(nodes, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"^expected cuda for stage 1 on b, got no GPU: name a "):
        check_gpus(nodes, {"a": 4, "b": 0})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_takes_as_much_cache_as_is_told(name: str, tmp_path: Path) -> None:
    family, fields = FAMILIES[name]
    path = make_tiny(tmp_path, family, layers=4, seed=1, **fields)
    shard = Shard.load(path, range(4), capacity=64, weights="fp32")
    shard.run(linear(b"a"), None, picks=1, stopped=never)
    assert shard.cache_nbytes == 4 * 4 * 64 * cache_width(open_checkpoint(path).config)


def test_stages_on_gpus_are_counted_with_their_cache_and_apart_from_those_on_cpus(
    tmp_path: Path,
) -> None:
    path = make_tiny(tmp_path, "llama", layers=4, seed=1, dtype=torch.float16)
    target = open_checkpoint(path)
    models = Models(target, None, "fp32", of(["cpu", "cuda:0", "cuda:0"]))
    nodes = models._nodes(models.split(3, [2, 1, 1]), ["a", "b", "b"], None)
    assert [node.place for node in nodes] == ["a", "cuda:0 of b", "cuda:0 of b"]
    layer, slots = target.sizes.layers[0], target.context + SPECULATIVE_SLOTS
    cache = 2 * 2 * 8 * 2 * slots  # keys and values of two heads of eight numbers, two bytes each
    assert nodes[0].nbytes == 4 * (2 * layer + target.sizes.first)
    assert nodes[1].nbytes == nodes[1].layer_nbytes == 2 * layer + cache
    assert nodes[2].nbytes == 2 * (layer + target.sizes.last) + cache
    # Both share the one card, the head on it, too.
    room = 2 * target.sizes.last + 5 * nodes[1].nbytes
    pools = {"a": [Pool("machine", 1 << 40)], "cuda:0 of b": [Pool("GPU", room)]}
    assert models._most_layers(nodes, 3, pools)[1:] == [2, 2]


@no_gpu
@pytest.mark.parametrize("devices", ["cuda", "cpu,cpu,cuda:3"])
@pytest.mark.parametrize("in_process", [True, False])
def test_a_machine_without_a_gpu_is_refused_before_anything_is_started(
    devices: str, in_process: bool
) -> None:
    pair = demo_pair()
    with pytest.raises(ValueError, match=r"^expected cuda.* on this process, got no GPU: name a"):
        Engine.from_pretrained(
            pair.target, devices=devices, in_process=in_process, self_test=False, stages=3
        )
