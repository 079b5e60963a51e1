from pathlib import Path

import pytest

from pipeinfer_dask.models.checkpoint import open_checkpoint
from pipeinfer_dask.models.layers import split_layers
from pipeinfer_dask.models.probe import LARGEST, layer_seconds
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.sources import locate
from tests.tiny import make_tiny


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_share_takes_the_bytes_that_its_shard_holds(
    tmp_path: Path, tied: bool, stages: int
) -> None:
    path = make_tiny(tmp_path, "qwen2", layers=3, seed=1, tie_word_embeddings=tied)
    sizes = open_checkpoint(path).sizes
    for layers in split_layers(3, stages):
        assert sizes.nbytes(layers) == 4 * Shard.load(path, layers, capacity=8).parameters


def test_a_head_counts_as_the_layers_that_it_weighs(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "llama", layers=2, seed=1)
    norm, head = 32, 288 * 32
    layer = 2 * 32 + 3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16
    assert open_checkpoint(path).sizes.head_layers == pytest.approx((norm + head) / layer)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("part", [LARGEST, 0.0], ids=["a layer", "a matrix"])
def test_a_layer_is_timed_without_any_weights(
    tmp_path: Path, layers: int, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny(tmp_path, "llama", layers=layers, seed=1)
    (path / "model.safetensors").unlink()
    monkeypatch.setattr("pipeinfer_dask.models.probe.LARGEST", part)
    monkeypatch.setattr("pipeinfer_dask.models.probe.WIDTH", 64)
    assert 0 < layer_seconds(locate(path), threads=1) < 1
