"""Which device each node computes on, and whether its worker has it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from pipeinfer_dask.models.checkpoint import Checkpoint
from pipeinfer_dask.models.device_names import CPU, Dtype, check_device, check_dtype
from pipeinfer_dask.runtime.planning.memory import Pool


@dataclass(frozen=True, slots=True)
class Devices:
    """What a user asks for. Made by `of`.

    Attributes
    ----------
    names : tuple of str
        One for each stage, or one for all.
    draft : str
        The draft model's.
    dtype : {"float32", "float16", "bfloat16"} or None
        What GPUs compute in; None for the checkpoint's own.
    cuda_graphs : bool
    """

    names: tuple[str, ...] = (CPU,)
    draft: str = CPU
    dtype: Dtype | None = None
    cuda_graphs: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether any node is on a GPU."""
        return {*self.names, self.draft} != {CPU}

    @classmethod
    def of(
        cls,
        devices: Any,
        draft: str | None,
        dtype: Dtype | None,
        *,
        cuda_graphs: bool,
    ) -> Self:
        """Check and complete what a user says; see `Engine.from_pretrained`.

        Raises
        ------
        ValueError
            If there is no such device or dtype, or a CPU is to compute in 16 bits.
        """
        if devices is None:
            devices = CPU
        given = devices.split(",") if isinstance(devices, str) else devices
        if not isinstance(given, Sequence) or not given:
            raise ValueError(
                f"expected devices as a name, or as a list of one for each stage, got {devices!r}"
            )
        names = tuple(check_device(name) for name in given)
        if dtype is not None:
            check_dtype(dtype)
            if dtype != "float32" and CPU in names:
                raise ValueError(
                    f"expected dtype='float32' for stages on a CPU, got {dtype!r}: leave dtype "
                    "out, or name GPUs with devices"
                )
        return cls(names, names[-1] if draft is None else check_device(draft), dtype, cuda_graphs)

    def for_stages(self, stages: int) -> tuple[str, ...]:
        """Return each stage's device.

        Raises
        ------
        ValueError
            If there are not as many as stages.
        """
        if len(self.names) not in (1, stages):
            raise ValueError(
                f"expected a device for each of {stages} stages, or one for all, got "
                f"{len(self.names)}: {', '.join(self.names)}"
            )
        return self.names if len(self.names) == stages else self.names * stages

    def dtype_of(self, model: Checkpoint, device: str) -> Dtype:
        """Return what a model is computed in on a device."""
        if device == CPU:
            return "float32"
        return model.dtype if self.dtype is None else self.dtype

    @property
    def on_gpus(self) -> bool:
        """Whether any node may be on a GPU."""
        return any(name != CPU for name in (*self.names, self.draft))

    @property
    def own_gpus(self) -> bool:
        """Whether each worker is to use the GPU that is its own, and none by number."""
        named = {*self.names, self.draft} - {CPU}
        return named == {"cuda"}


CPUS = Devices()
"""All on CPUs."""


def gpu_count() -> int:
    """Return how many GPUs this process sees. It touches none of them."""
    return torch.cuda.device_count()


def gpu_pools(names: Iterable[str]) -> dict[str, Pool]:
    """Return the free memory of these GPUs, by name. This process then has a share in each.

    Workers that see the same GPU name its pool alike, by whatever number they know it.
    """
    pools = {}
    for name in names:
        number = torch.device(name).index if ":" in name else torch.cuda.current_device()
        free, _ = torch.cuda.mem_get_info(number)
        uuid = torch.cuda.get_device_properties(number).uuid
        pools[name] = Pool(f"GPU {uuid} of {platform.node()}", free)
    return pools


def check_gpus(nodes: Iterable[tuple[str, str, str]], counts: Mapping[str, int]) -> None:
    """Check that each node's worker has the device that it is to use.

    Parameters
    ----------
    nodes : iterable of (node, worker, device)
    counts : mapping of str to int
        By worker, the GPUs that it sees.

    Raises
    ------
    ValueError
        If one has not.
    """
    for node, worker, device in nodes:
        number = 0 if device == "cuda" else int(device.removeprefix("cuda:"))
        count = counts[worker]
        if number >= count:
            had = (
                "no GPU" if not count else f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0"
            )
            raise ValueError(
                f"expected {device} for {node} on {worker}, got {had}: name a device that it has, "
                "use a worker with a GPU and a torch made for it, or leave devices out"
            )
