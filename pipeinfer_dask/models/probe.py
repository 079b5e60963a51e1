"""What a layer of a model takes, of time and of memory, told without a weight of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import AutoConfig, PreTrainedConfig

from pipeinfer_dask.models.attention import SLOT_ATTENTION
from pipeinfer_dask.models.device_names import CPU
from pipeinfer_dask.models.devices import Device, device_of
from pipeinfer_dask.models.families import model_class
from pipeinfer_dask.models.inputs import Inputs
from pipeinfer_dask.models.shard import Shard, building
from pipeinfer_dask.models.sources import Source
from pipeinfer_dask.models.splice import spliced
from pipeinfer_dask.protocol.messages import NO_PARENT, Batch

ROUNDS = 7
"""The fastest of so many counts: whatever else a machine does only makes it slower."""
LARGEST = 0.25
"""A layer that would take more than this part of the free memory is not made."""
WIDTH = 4096
"""Then a matrix of so many rows and columns stands for it: 64 MiB, more than caches hold."""


def layer_seconds(source: Source, threads: int, device: str = CPU) -> float:
    """Return the seconds that one token takes through a random layer of a model's configuration.

    A layer that is too large for this machine's free memory is told by a smaller matrix: what
    one token takes is the time to read the weights.

    Parameters
    ----------
    source : Source
        Only its configuration is read.
    threads : int
        Threads that torch may use.
    device : str
        Where to compute; in float32, whatever a GPU will compute in.

    Raises
    ------
    FileNotFoundError
        If the model is not there.
    """
    config = AutoConfig.from_pretrained(source.directory())
    # The thread count belongs to a thread, and this one is somebody else's.
    with ThreadPoolExecutor(1) as own:
        return own.submit(_seconds, config, threads, device).result()


def _seconds(config: PreTrainedConfig, threads: int, device: str) -> float:
    torch.set_num_threads(threads)
    where = device_of(device, "float32")
    with where.computing():
        return _measured(config, where)


def _measured(config: PreTrainedConfig, where: Device) -> float:
    model, layers = _without_memory(config)
    count: int = sum(parameter.numel() for parameter in model.parameters())
    if 4 * count > LARGEST * where.free_nbytes():
        matrix, token = (torch.ones(rows, WIDTH, device=where.place) for rows in (WIDTH, 1))
        return _fastest(lambda: where.take(linear(token, matrix))) * count / matrix.numel()
    model = model.to_empty(device=where.place).float().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        # What happens to be in memory may be subnormal numbers, which are slow.
        tensor.fill_(0.01)
    shard = Shard(model, layers, capacity=1, parameters=count, device=where)
    batch = Batch((0,), (0,), (0,), (NO_PARENT,))
    hidden = None if shard.is_first else np.ones((1, config.hidden_size), np.float32)
    return _fastest(lambda: shard.run(batch, hidden, picks=0, stopped=bool))


def cache_width(config: PreTrainedConfig) -> int:
    """Return the numbers that a layer keeps of a token: its keys and values."""
    model, layers = _without_memory(config)
    meta = Device("meta", torch.bfloat16)  # some families' experts are computed so, or not at all
    model.to(meta.dtype)
    shard = Shard(model, layers, capacity=1, parameters=0, device=meta)
    zero, self_alone = np.zeros(1, np.int64), np.ones((1, 1), np.bool_)
    given = zero if shard.is_first else np.zeros((1, config.hidden_size), np.float32)
    with torch.inference_mode():
        shard.compute_all(Inputs(*map(meta.put, (given, zero, zero, self_alone, zero))))
    return shard.cache_nbytes // meta.dtype.itemsize


def _without_memory(config: PreTrainedConfig) -> tuple[Any, range]:
    """Return a model of one layer of the middle, on torch's meta device, and its number."""
    number = (config.num_hidden_layers - 1) // 2
    layers = range(number, number + 1)
    config = copy(config)
    config._attn_implementation = SLOT_ATTENTION
    family = spliced(model_class(config), layers)
    with building, torch.device("meta"):
        return family(config), layers


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
