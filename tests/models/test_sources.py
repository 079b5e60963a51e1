"""Each machine finds a model by itself, and needs no more of it than its own share."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeinfer_dask.models.checkpoint import open_checkpoint
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.sources import Source, locate
from tests.tiny import make_tiny

LAYERS = 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    return make_tiny(folder, "llama", layers=LAYERS, seed=1, max_shard_size="20KB")


def files_of(model: Path, *marks: str) -> set[str]:
    """Return the files that hold tensors whose names contain any of these."""
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    return {file for name, file in index.items() if any(mark in name for mark in marks)}


def only(model: Path, copy: Path, files: set[str]) -> Path:
    """Copy a model with these of its weight files, and without its tokenizer."""
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    for file in files:
        shutil.copy(model / file, copy)
    return copy


def test_a_stage_loads_from_a_directory_that_holds_its_own_files_alone(
    in_parts: Path, tmp_path: Path
) -> None:
    own = files_of(in_parts, "layers.1.", "layers.2.")
    assert own < files_of(in_parts, "")
    copy = only(in_parts, tmp_path / "copy", own)
    whole = Shard.load(in_parts, range(1, 3), capacity=8)
    assert Shard.load(copy, range(1, 3), capacity=8).parameters == whole.parameters


def test_a_file_of_a_stages_own_that_is_not_there_is_named_with_a_tensor(
    in_parts: Path, tmp_path: Path
) -> None:
    lost = sorted(files_of(in_parts, "layers.3."))[0]
    copy = only(in_parts, tmp_path / "copy", files_of(in_parts, "") - {lost})
    message = rf"{lost} is not there, which holds model\.layers\.3\..* by the index"
    with pytest.raises(FileNotFoundError, match=message):
        Shard.load(copy, range(3, 4), capacity=8)


def test_a_client_whose_workers_have_the_weights_needs_none(in_parts: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(in_parts, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    found = open_checkpoint(copy, elsewhere=True)
    assert found.sizes == open_checkpoint(in_parts).sizes
    with pytest.raises(FileNotFoundError, match="is not there, which holds"):
        open_checkpoint(copy)
    (copy / "model.safetensors.index.json").unlink()
    assert open_checkpoint(copy, elsewhere=True).num_layers == LAYERS


def test_what_of_the_weights_is_on_the_client_is_checked(in_parts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(in_parts, tmp_path / "copy")
    first, second, *_ = sorted(copy.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{second.name} has .* bytes, but its header speaks of"):
        open_checkpoint(copy, elsewhere=True)
    index = copy / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    del names["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": names}))
    shutil.copy(in_parts / second.name, copy)
    with pytest.raises(ValueError, match=r"lacks the tensor model\.norm\.weight"):
        open_checkpoint(copy, elsewhere=True)


def test_variables_in_a_path_mean_what_they_mean_on_each_machine(
    in_parts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODELS", str(in_parts.parent))
    source = locate(f"$MODELS/{in_parts.name}")
    assert source.directory() == in_parts
    monkeypatch.setenv("MODELS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no directory {tmp_path}/.* on this machine"):
        source.directory()


def test_a_relative_path_holds_wherever_a_worker_runs(
    in_parts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(in_parts.parent)
    source = locate(in_parts.name)
    monkeypatch.chdir(tmp_path)
    assert source.directory() == in_parts


HUB_SCRIPT = """
import sys
from pipeinfer_dask.models.checkpoint import load_tokenizer, open_checkpoint
from pipeinfer_dask.models.shard import Shard
found = open_checkpoint("somebody/model")
load_tokenizer(found)
print(found.source.name, found.source.revision)
for share in (range(1, 3), range(3, 4)):
    try:
        print(Shard.load(found.source, share, capacity=8).parameters)
    except FileNotFoundError as error:
        print(error)
"""


def test_a_model_in_the_hubs_cache_loads_offline_from_the_files_of_its_share(
    in_parts: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "home" / "hub" / "models--somebody--model"
    own = files_of(in_parts, "layers.1.", "layers.2.")
    snapshot = only(in_parts, repository / "snapshots" / COMMIT, own)
    for file in in_parts.glob("tokenizer*"):
        shutil.copy(file, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    # The hub's settings are read when it is imported.
    child = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT],
        env={
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": ":".join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert child.returncode == 0, child.stderr
    source, parameters, missing = child.stdout.splitlines()
    assert source == f"somebody/model {COMMIT}"
    assert int(parameters) == Shard.load(in_parts, range(1, 3), capacity=8).parameters
    lost = files_of(in_parts, "layers.3.", "norm", "lm_head") - own
    assert re.match(
        rf"({'|'.join(sorted(lost))}) of somebody/model is not in this machine's", missing
    )


def test_a_model_of_the_hub_is_the_same_commit_on_every_machine() -> None:
    with pytest.raises(FileNotFoundError, match="no directory nobody/nothing, and it can't be had"):
        Source("nobody/nothing", COMMIT).directory()
