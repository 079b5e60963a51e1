"""A worker's memory while it loads is its shard, and little more."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from threading import Lock

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from pipeinfer_dask.models.families import model_class
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.models.tensors import READ_BYTES, stored_tensors, unread
from tests.tiny import make_tiny

LAYERS = 20
MIB = 1 << 20


def write_sparse(path: Path, dtype: str) -> Path:
    """Write a model of 40 MiB a layer in 32 bits, all zeros, which takes no room on the disk."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=288,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
    )
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in model_class(config)(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * {"F32": 4, "BF16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


# The system itself notes the most that was resident (pages of the file among it), so that no
# peak is missed. A small model comes first, for what loading allocates once and for all.
SCRIPT = """
import ctypes
import sys
from pathlib import Path
import numpy as np
import torch
from pipeinfer_dask.protocol.messages import Batch
from pipeinfer_dask.models.linears import has_kernels
from pipeinfer_dask.models.shard import Shard

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

small, wide, narrow = sys.argv[1:]
torch.set_num_threads(1)
run = Batch((0,), (0,), (0,), (-1,)), np.zeros((1, 32), np.float32)
Shard.load(small, range(1, 2), capacity=8).run(*run, picks=0, stopped=bool)
for model, layers, weights, number_bytes in (
    (wide, range(1, 6), "fp32", 4),
    (narrow, range(1, 6), "fp32", 4),
    (narrow, range(1, 19), "auto", 2 if has_kernels() else 4),
):
    ctypes.CDLL(None).malloc_trim(0)  # what the load before gave back is not to be reused
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    shard = Shard.load(model, layers, capacity=8, weights=weights)
    shard.run(run[0], np.zeros((1, 1024), np.float32), picks=0, stopped=bool)
    print(resident("VmHWM") - before, number_bytes * shard.parameters)
    del shard
"""


@pytest.mark.slow
def test_a_worker_takes_at_most_its_shard_and_a_tenth(tmp_path: Path, deep: Path) -> None:
    models = [write_sparse(tmp_path / dtype, dtype) for dtype in ("F32", "BF16")]
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, deep, *models], capture_output=True, text=True, timeout=100
    )
    assert child.returncode == 0, child.stderr
    for line in child.stdout.splitlines():
        peak, shard = map(int, line.split())
        assert shard > 190 * MIB
        # What is mapped is there after a run, what is converted or packed leaves nothing behind.
        assert 0.9 * shard < peak < 1.1 * shard, line


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("deep"), "llama", layers=3, seed=1)


def test_weights_of_32_bits_are_the_files_own_pages(deep: Path) -> None:
    stored = stored_tensors(deep)
    tensors = {name: tensor[...] for name, tensor in unread(stored).items()}
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(deep / "model.safetensors"))
    ]
    assert all(any(t.data_ptr() in pages for pages in mapped) for t in tensors.values())


def test_the_bytes_of_a_share_are_counted_to_the_last(deep: Path) -> None:
    told: list[tuple[int, int]] = []
    lock = Lock()

    def count(nbytes: int, total: int) -> None:
        assert lock.acquire(blocking=False)  # one at a time, though several threads read
        told.append((nbytes, total))
        lock.release()

    shard = Shard.load(deep, range(1, 2), capacity=8, count=count)
    assert told[-1] == (4 * shard.parameters, 4 * shard.parameters)
    assert [nbytes for nbytes, _ in told] == sorted(nbytes for nbytes, _ in told)


def test_a_tensor_of_several_pieces_at_an_odd_place_is_read_whole(tmp_path: Path) -> None:
    numbers = torch.arange(READ_BYTES // 4 + 5, dtype=torch.float32)
    save_file({"numbers": numbers}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    # A header of odd length, as of a writer that does not pad it.
    header = content[8 : 8 + length].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    odd = struct.pack("<Q", len(header)) + header + content[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(odd)
    told: list[tuple[int, int]] = []
    tensor = unread(stored_tensors(tmp_path), lambda *so_far: told.append(so_far))["numbers"][...]
    assert torch.equal(tensor, numbers)
    assert told == [(READ_BYTES, numbers.nbytes), (numbers.nbytes, numbers.nbytes)]


def test_a_tensor_without_numbers_is_empty(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0, 3)}, tmp_path / "model.safetensors")
    assert unread(stored_tensors(tmp_path))["none"][...].shape == (0, 3)
