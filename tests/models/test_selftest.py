from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import pipeinfer_dask as pi
from pipeinfer_dask.models.checkpoint import open_checkpoint
from pipeinfer_dask.models.families import SPECIAL, context_of
from pipeinfer_dask.models.selftest import check_split, shrunk
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.specials import Special
from tests.families import FAMILIES
from tests.tiny import make_tiny


def config_of(family: str, **fields: Any) -> Any:
    return AutoConfig.for_model(family, **fields)


def test_the_small_model_keeps_a_layer_of_each_kind() -> None:
    small: Any = shrunk(config_of("gemma3_text", num_hidden_layers=26))
    assert small.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    small = shrunk(config_of("qwen3_moe", num_hidden_layers=8, mlp_only_layers=[5, 6]))
    assert (small.num_hidden_layers, small.mlp_only_layers) == (3, [2])
    small = shrunk(config_of("deepseek_v3"))
    assert (small.num_hidden_layers, small.first_k_dense_replace) == (3, 2)
    small = shrunk(config_of("gpt_neo"))
    assert small.attention_layers == ["global", "local", "global"]


def test_the_small_model_keeps_the_size_of_its_heads_and_how_they_share_keys() -> None:
    small: Any = shrunk(config_of("llama", hidden_size=8192, num_attention_heads=64))
    assert small.hidden_size // small.num_attention_heads == 128
    assert (small.num_attention_heads, small.num_key_value_heads) == (2, 2)
    small = shrunk(config_of("mistral", num_attention_heads=32, num_key_value_heads=8))
    assert (small.num_attention_heads, small.num_key_value_heads) == (6, 2)
    small = shrunk(config_of("gpt_bigcode", n_embd=2048, n_head=16))
    assert (small.num_attention_heads, small.num_key_value_heads) == (3, 1)


def test_the_small_models_windows_are_shorter_than_its_text() -> None:
    assert shrunk(config_of("mistral", sliding_window=4096)).sliding_window == 8
    assert shrunk(config_of("mistral", sliding_window=None)).sliding_window is None
    assert shrunk(config_of("llama4_text")).attention_chunk_size == 8


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("phi3", {"rope_type": "longrope", "short_factor": [1.5] * 48, "long_factor": [3.0] * 48}),
        ("llama", {"rope_type": "yarn", "factor": 4.0}),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
        ("deepseek_v3", {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1}),
    ],
)
def test_stretched_positions_pass(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 256} | fields
    special: dict[str, Any] = {"rope_parameters": rope}
    if family == "deepseek_v3":
        special |= FAMILIES[family][1]
    if family == "phi3":
        special |= {"head_dim": 96, "hidden_size": 384, "original_max_position_embeddings": 256}
    path = make_tiny(tmp_path, family, layers=2, seed=1, **special)
    checkpoint = open_checkpoint(path)
    check_split(checkpoint)
    # Beyond this place the keys in the cache would have other positions than the new ones.
    assert checkpoint.context == (256 if rope["rope_type"] == "longrope" else 512)


def test_a_context_is_what_the_configuration_names_or_the_familys_own() -> None:
    assert context_of(config_of("mpt", max_seq_len=300)) == 300
    assert context_of(config_of("bloom")) == 2048
    assert context_of(config_of("bloom", seq_length=4096)) == 4096
    assert context_of(config_of("gpt2", n_positions=77)) == 77


def test_an_engine_refuses_a_model_whose_stages_say_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPECIAL, "bloom", Special(context=512))
    path = make_tiny(tmp_path, "bloom", layers=2, seed=1, layer_norm_epsilon=1e-4)
    with pytest.raises(ValueError, match=r"small bloom model .* in stages as in one piece, got"):
        pi.Engine.from_pretrained(path, stages=2, in_process=True)
    pi.Engine.from_pretrained(path, stages=2, in_process=True, self_test=False).close()


def test_settings_that_were_tried_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        make_tiny(tmp_path / str(layers), "llama", layers=layers, seed=1, dtype=dtype)
        for layers, dtype in ((4, torch.float32), (5, torch.bfloat16))
    ]
    check_split(open_checkpoint(paths[0]))

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Shard, "load", fail)
    check_split(open_checkpoint(paths[1]))
    other = make_tiny(tmp_path / "other", "llama", layers=4, seed=1, rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"no small llama model .* self_test=False to go without"):
        check_split(open_checkpoint(other))
