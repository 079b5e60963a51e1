import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeinfer_dask.models.checkpoint import check_pair, load_tokenizer, open_checkpoint
from tests.tiny import make_tiny


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "llama", "llama", layers=2, seed=1)


@pytest.fixture
def in_parts(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "parts", "llama", layers=2, seed=1, max_shard_size="20KB")


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_sound_checkpoint_tells_what_a_pipeline_needs_to_know(llama: Path) -> None:
    found = open_checkpoint(str(llama))
    assert (found.path, found.model_type, found.num_layers) == (llama, "llama", 2)
    assert (found.vocab_size, found.context, found.hidden_size) == (288, 512, 32)
    stored = (llama / "model.safetensors").stat().st_size - header_bytes(llama)
    assert found.sizes.nbytes(range(2)) == stored
    assert found.sizes.nbytes(range(1)) + found.sizes.nbytes(range(1, 2)) == stored
    assert found.eos_token_ids == ()


def header_bytes(path: Path) -> int:
    with (path / "model.safetensors").open("rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])


@pytest.mark.parametrize(("stored", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_the_tokens_that_end_a_text_are_those_of_generate(
    llama: Path, stored: int | list[int] | None, ids: tuple[int, ...]
) -> None:
    change_json(llama / "generation_config.json", eos_token_id=stored)
    change_json(llama / "config.json", eos_token_id=5)
    assert open_checkpoint(llama).eos_token_ids == ids
    (llama / "generation_config.json").unlink()
    assert open_checkpoint(llama).eos_token_ids == (5,)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_need_not_be_stored(tmp_path: Path, tied: bool) -> None:
    path = make_tiny(tmp_path, "llama", layers=1, seed=1, tie_word_embeddings=True)
    change_json(path / "config.json", tie_word_embeddings=tied)
    if tied:
        assert open_checkpoint(path).num_layers == 1
    else:
        with pytest.raises(ValueError, match=r"lacks the tensor lm_head\.weight"):
            open_checkpoint(path)


def test_weights_in_several_files_are_found(in_parts: Path) -> None:
    assert len(list(in_parts.glob("*.safetensors"))) > 1
    assert open_checkpoint(in_parts).num_layers == 2


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no directory {tmp_path}/nowhere: give"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_hub_name_that_cannot_be_had_offline_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no directory nobody/nothing, and it can't be had"):
        open_checkpoint("nobody/nothing")


def test_a_file_is_no_checkpoint(llama: Path) -> None:
    with pytest.raises(ValueError, match="expected the directory of a model"):
        open_checkpoint(llama / "config.json")


def test_a_directory_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no model: it has no config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must hold a JSON object, not a list"),
        ("{}", "names no model_type"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not valid JSON"),
    ],
    ids=["no end", "a list", "no fields", "too deep"],
)
def test_a_broken_configuration_is_refused(llama: Path, text: str, message: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "mamba"}, "mamba models are recurrent"),
        ({"model_type": "qwen3_next"}, "qwen3_next models are recurrent"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 models are encoder-decoders"),
        ({"model_type": "somebodys"}, "the somebodys family is not known here; known are bloom,"),
        (
            {"model_type": "somebodys", "auto_map": {"AutoModelForCausalLM": "their.Model"}},
            "the somebodys family is known only to code that comes with the checkpoint (auto_map), "
            "which is never run",
        ),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            "gemma3 models take more than text; give a checkpoint of the text model alone, such "
            "as one of gemma3_text",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "its weights are quantised (gptq); give a checkpoint in 16 or 32 bits",
        ),
    ],
)
def test_an_architecture_that_cannot_be_split_is_refused_with_the_reason(
    llama: Path, fields: dict[str, Any], reason: str
) -> None:
    change_json(llama / "config.json", **fields)
    with pytest.raises(ValueError, match=f"can't be split into stages: {re.escape(reason)}"):
        open_checkpoint(llama)


def test_a_configuration_that_no_model_can_have_is_refused_in_one_line(llama: Path) -> None:
    change_json(llama / "config.json", hidden_size="wide")
    with pytest.raises(ValueError, match="is wrong for a llama model") as caught:
        open_checkpoint(llama)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "field"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_configuration_of_more_layers_than_tensors_is_refused_before_they_are_made(
    tmp_path: Path, family: str, field: str
) -> None:
    path = make_tiny(tmp_path, family, layers=1, seed=1)
    change_json(path / "config.json", **{field: 10**12})
    with pytest.raises(
        ValueError, match=r"config\.json speaks of 1000000000000 layers, .* tensors"
    ):
        open_checkpoint(path)


def test_a_model_without_a_tokenizer_is_refused(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer: expected one of tokenizer"):
        open_checkpoint(llama)


def test_a_model_without_safetensors_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        open_checkpoint(llama)


def test_a_file_that_the_index_names_must_be_there(in_parts: Path) -> None:
    lost = sorted(in_parts.glob("*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{lost.name} is not there, which holds "):
        open_checkpoint(in_parts)


def test_a_file_must_hold_what_the_index_says(in_parts: Path) -> None:
    index = in_parts / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=files | {"another": files["lm_head.weight"]})
    with pytest.raises(ValueError, match=r"lacks another, which .* says it holds"):
        open_checkpoint(in_parts)


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[]", '{"weight_map": 3}', "[" * 100_000],
    ids=["no end", "no map", "a list", "a number", "too deep"],
)
def test_a_broken_index_is_refused(in_parts: Path, text: str) -> None:
    (in_parts / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        open_checkpoint(in_parts)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(llama: Path, kept: int) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"truncated|but its header speaks of"):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b"{}", b'{"a": {}}', b'{"a": 1}', b"\xff", b"[" * 100_000],
    ids=["no end", "a list", "nothing", "no fields", "a number", "no text", "too deep"],
)
def test_a_corrupt_header_is_refused(llama: Path, header: bytes) -> None:
    content = struct.pack("<Q", len(header)) + header + b"more"
    (llama / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"corrupt header|but its header speaks of"):
        open_checkpoint(llama)


def test_a_missing_tensor_is_named(llama: Path) -> None:
    rewrite_weights(llama, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj"):
        open_checkpoint(llama)


def test_a_tensor_of_another_shape_is_named(llama: Path) -> None:
    rewrite_weights(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight in .* has shape \[7\].* \[32\]"):
        open_checkpoint(llama)


def test_a_missing_expert_is_noticed_though_experts_are_fused(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "mixtral", layers=1, seed=1, num_local_experts=3)
    assert open_checkpoint(path).model_type == "mixtral"
    names = [name for name in load_file(path / "model.safetensors") if ".2." in name]
    rewrite_weights(path, lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(ValueError, match=r"experts\.\w+ in .* shape \[2, .* calls for \[3, "):
        open_checkpoint(path)


def test_an_expert_of_another_shape_is_noticed_though_experts_are_fused(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "mixtral", layers=1, seed=1, num_local_experts=3)
    name = next(name for name in load_file(path / "model.safetensors") if ".2." in name)
    rewrite_weights(path, lambda tensors: tensors.update({name: torch.ones(7, 7)}))
    with pytest.raises(ValueError, match=r"experts\.\w+ can't be made of the tensors in") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_tensor_of_whole_numbers_is_named(llama: Path) -> None:
    whole = torch.ones(32, dtype=torch.int8)
    rewrite_weights(llama, lambda tensors: tensors.update({"model.norm.weight": whole}))
    with pytest.raises(ValueError, match="is stored as I8, expected one of BF16"):
        open_checkpoint(llama)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "Q4"])
def test_a_tensor_of_a_type_that_is_not_computed_is_named(llama: Path, dtype: str) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', f'"{dtype}"'.encode(), 1))
    content = weights.read_bytes()
    header = content[8 : content.index(b"}}") + 2]
    weights.write_bytes(
        struct.pack("<Q", len(header)) + header + content[-header_free_bytes(header) :]
    )
    with pytest.raises(ValueError, match=f"is stored as {dtype}, expected .* not quantised"):
        open_checkpoint(llama)


def header_free_bytes(header: bytes) -> int:
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return max(int(entry["data_offsets"][1]) for entry in entries.values())


def test_a_tensor_whose_bytes_are_not_those_of_its_shape_is_refused(llama: Path) -> None:
    weights = llama / "model.safetensors"
    content = weights.read_bytes()
    assert content.count(b'"shape":[32]') > 1
    weights.write_bytes(content.replace(b'"shape":[32]', b'"shape":[31]', 1))
    with pytest.raises(ValueError, match="has a corrupt header: download it again"):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "score.weight"],
    ids=["a layer more", "a bias", "another head"],
)
def test_a_tensor_that_the_architecture_has_no_use_for_is_named(llama: Path, name: str) -> None:
    rewrite_weights(llama, lambda tensors: tensors.update({name: torch.ones(32)}))
    with pytest.raises(ValueError, match=f"1 tensors that .* no use for, the first {name}: the"):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attn.bias"],
)
def test_what_old_checkpoints_hold_and_todays_models_compute_does_no_harm(
    llama: Path, name: str
) -> None:
    rewrite_weights(llama, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert open_checkpoint(llama).num_layers == 2


def test_the_tokenizer_of_a_checkpoint_reads_back_what_it_wrote(llama: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(llama))
    assert tokenizer.decode(tokenizer.encode("def f(x):\n\treturn é")) == "def f(x):\n\treturn é"


def test_a_broken_tokenizer_is_refused_in_one_line(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer in .* can't be loaded") as caught:
        load_tokenizer(open_checkpoint(llama))
    assert "\n" not in str(caught.value)


def test_models_of_one_vocabulary_are_a_pair(llama: Path, tmp_path: Path) -> None:
    draft = make_tiny(tmp_path / "draft", "qwen2", layers=1, seed=3)
    check_pair(open_checkpoint(llama), open_checkpoint(draft))


def test_models_of_one_vocabulary_may_have_heads_of_different_sizes(
    llama: Path, tmp_path: Path
) -> None:
    draft = make_tiny(tmp_path / "draft", "llama", layers=1, seed=3, padded_to=300)
    check_pair(open_checkpoint(llama), open_checkpoint(draft))


def test_vocabularies_of_different_tokens_are_no_pair(llama: Path, tmp_path: Path) -> None:
    draft = make_tiny(tmp_path / "draft", "llama", layers=1, seed=3, vocab_size=300)
    with pytest.raises(ValueError, match=r"token 287 is '<\|end.*, and '<287>' in .*draft"):
        check_pair(open_checkpoint(llama), open_checkpoint(draft))


def test_a_draft_may_know_a_token_more_behind_all_others(llama: Path, tmp_path: Path) -> None:
    draft = make_tiny(tmp_path / "draft", "llama", layers=1, seed=3)
    file = draft / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["<more>"] = 288
    file.write_text(json.dumps(tokenizer))
    check_pair(open_checkpoint(llama), open_checkpoint(draft))


@pytest.mark.parametrize("ids", [[[1], 2], [1, "a"], "x", -1, True])
def test_end_tokens_that_are_no_token_ids_are_refused(llama: Path, ids: object) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=r"expected eos_token_id in .*generation_config.json as"):
        open_checkpoint(llama)


def test_no_name_is_no_directory() -> None:
    with pytest.raises(ValueError, match="got an empty name"):
        open_checkpoint("")


def test_vocabularies_that_number_a_token_differently_are_no_pair(
    llama: Path, tmp_path: Path
) -> None:
    draft = make_tiny(tmp_path / "draft", "llama", layers=1, seed=3)
    file = draft / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<256>"], vocabulary["<257>"] = 257, 256
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"token 256 is '<256>' in .*llama, and '<257>' in"):
        check_pair(open_checkpoint(llama), open_checkpoint(draft))
