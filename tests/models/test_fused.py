from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeinfer_dask.models.attention import SLOT_ATTENTION
from pipeinfer_dask.models.families import model_class
from pipeinfer_dask.models.fused import SHAPES
from pipeinfer_dask.models.norms import RootMeanSquare, bare_norm
from pipeinfer_dask.models.passes import FusedPass, fused_pass
from pipeinfer_dask.models.shard import Shard
from tests.models.pipelines import LAYERS, TEXT, assert_same, expected, linear, load, through
from tests.tiny import make_tiny


def model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=SLOT_ATTENTION
    ).requires_grad_(False)


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_a_family_whose_layers_are_in_the_table_is_fused(family: str, tmp_path: Path) -> None:
    path = make_tiny(tmp_path, family, layers=3, seed=1, norms=0.3)
    for layers in (range(1), range(1, 3)):
        assert isinstance(Shard.load(path, layers, capacity=8)._pass, FusedPass)


def test_a_family_that_is_not_in_the_table_keeps_its_own_code(tmp_path: Path) -> None:
    assert fused_pass(model(make_tiny(tmp_path, "opt", layers=2, seed=1)), range(2)) is None


def test_a_layer_that_computes_something_else_keeps_a_model_from_being_fused(
    tmp_path: Path,
) -> None:
    changed = model(make_tiny(tmp_path, "llama", layers=3, seed=1))
    assert fused_pass(changed, range(3)) is not None
    mlp = changed.model.layers[1].mlp
    # As some families scale what a layer adds.
    hook = mlp.register_forward_hook(lambda module, args, output: 0.5 * output)
    assert fused_pass(changed, range(3)) is None
    hook.remove()
    mlp.scaled_proj = mlp.gate_proj
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.scaled_proj(x)) * mlp.up_proj(x))
    del mlp.gate_proj
    assert fused_pass(changed, range(3)) is None


@pytest.mark.parametrize("part", ["embed_tokens", "norm"])
def test_what_is_around_the_layers_has_to_be_the_same_too(part: str, tmp_path: Path) -> None:
    changed = model(make_tiny(tmp_path, "llama", layers=2, seed=1))
    getattr(changed.model, part).register_forward_hook(lambda module, args, output: 3 * output)
    assert fused_pass(changed, range(2)) is None


def test_the_layers_of_a_model_that_is_fused_have_no_hooks_left(tmp_path: Path) -> None:
    fused = model(make_tiny(tmp_path, "llama", layers=2, seed=1))
    assert fused_pass(fused, range(2)) is not None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fused.modules())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
def test_a_norm_in_few_operations_is_the_familys(scale: float, tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "llama", layers=1, seed=1)
    norm = model_class(model(path).config)(model(path).config).model.norm
    torch.nn.init.normal_(norm.weight)
    x = scale * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        bare = bare_norm(norm)
        assert isinstance(bare, RootMeanSquare)
        torch.testing.assert_close(bare(x), norm(x), rtol=1e-5, atol=1e-6)


def test_a_norm_of_another_kind_is_the_familys_own() -> None:
    class Halved(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    norm, x = Halved(8), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(bare_norm(norm)(x), norm(x))
        plain = bare_norm(nn.LayerNorm(8))
        assert torch.allclose(plain(x), nn.LayerNorm(8)(x))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_norm_of_weights_that_are_no_numbers_is_refused(weight: float) -> None:
    norm = nn.RMSNorm(8, eps=1e-6)
    nn.init.constant_(norm.weight, weight)
    with pytest.raises(ValueError, match="a norm has weights that are no finite numbers"):
        bare_norm(norm)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("cohere", {"use_qk_norm": False, "logit_scale": 0.5}),
        ("gemma2", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
        ("gemma3_text", {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.1}),
        ("phi", {"qk_layernorm": True}),
        ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ],
)
def test_settings_of_a_family_are_heeded(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    path = make_tiny(tmp_path, family, layers=LAYERS, seed=1, norms=0.3, **fields)
    stages = load(path, 2)
    assert all(isinstance(stage._pass, FusedPass) for stage in stages)
    stock = AutoModelForCausalLM.from_pretrained(path)
    assert_same(through(stages, linear(TEXT), len(TEXT)), expected(stock, TEXT))
