from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeinfer_dask.models.attention import SLOT_ATTENTION
from pipeinfer_dask.models.families import model_class
from pipeinfer_dask.models.fused import LLAMA_SHAPED, FusedLayer, RootMeanSquare, fuse
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.splice import decoder_layers
from tests.tiny import make_tiny


def model(path: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=SLOT_ATTENTION
    )
    return loaded.requires_grad_(False)


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
def test_every_layer_of_a_llama_shaped_family_is_fused(family: str, tmp_path: Path) -> None:
    shard = Shard.load(make_tiny(tmp_path, family, layers=3, seed=1), range(1, 3), capacity=8)
    assert [type(layer) for layer in decoder_layers(shard._model)[1]] == [FusedLayer, FusedLayer]


def test_a_layer_that_computes_something_else_keeps_its_own_code(tmp_path: Path) -> None:
    changed: Any = model(make_tiny(tmp_path, "llama", layers=3, seed=1))
    first, second, third = changed.model.layers
    # As some families scale what a layer adds; and one whose parts have other names.
    second.mlp.register_forward_hook(lambda module, args, output: 0.5 * output)
    third.norm = third.input_layernorm
    del third.input_layernorm
    assert fuse(changed, range(3)) == 1
    assert [type(layer) is FusedLayer for layer in changed.model.layers] == [True, False, False]
    assert (changed.model.layers[1], changed.model.layers[2]) == (second, third)
    assert first is not changed.model.layers[0]


def test_a_family_that_is_not_known_to_be_llama_shaped_keeps_its_own_code(tmp_path: Path) -> None:
    assert fuse(model(make_tiny(tmp_path, "gpt2", layers=2, seed=1)), range(2)) == 0


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
def test_a_norm_in_few_operations_is_the_familys(scale: float, tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "llama", layers=1, seed=1)
    norm = model_class(model(path).config)(model(path).config).model.norm
    torch.nn.init.normal_(norm.weight)
    x = scale * torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(RootMeanSquare(norm)(x), norm(x), rtol=1e-5, atol=1e-6)
