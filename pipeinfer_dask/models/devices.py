"""Where a stage computes: how numbers get onto its device, and results off it.

A CPU computes in float32. A GPU computes in the dtype that it is told, in a stream of its own
for each stage, and what crosses its border passes through pinned memory: copies in wait for
nobody, and a copy out is waited for once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from pipeinfer_dask.models.device_names import CPU, Dtype, check_device, check_dtype

WARM_UPS = 2
"""Passes before one is captured: libraries set themselves up in the first."""


class Device:
    """The processor of this machine.

    Parameters
    ----------
    place : str
        The device's name in torch.
    dtype : torch.dtype
        What is computed in.

    Attributes
    ----------
    place : torch.device
    dtype : torch.dtype
    is_gpu : bool
    """

    is_gpu = False

    def __init__(self, place: str = CPU, dtype: torch.dtype = torch.float32) -> None:
        self.place = torch.device(place)
        self.dtype = dtype

    def free_nbytes(self) -> int:
        """Return the bytes of memory that are free."""
        return int(psutil.virtual_memory().available)

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context in which a pass is computed."""
        return nullcontext()

    def put(self, numbers: npt.NDArray[Any], into: Tensor | None = None) -> Tensor:
        """Bring numbers onto the device, into a tensor of the same shape if there is one."""
        there = _tensor(numbers)
        return there.to(self.place) if into is None else into.copy_(there)

    def take(self, result: Tensor) -> Tensor:
        """Bring a result of a pass off the device, contiguous, and wait for it.

        Float16 stays what it is; bfloat16, which numpy does not know, becomes float32.
        """
        return self._carried(result)

    def captured(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return what computes the same over the same memory, as fast as the device can."""
        return compute

    def _carried(self, result: Tensor) -> Tensor:
        dtype = torch.float32 if result.dtype == torch.bfloat16 else result.dtype
        return result.to(dtype).contiguous()


class CudaDevice(Device):
    """A GPU: by its number, or the one that is the process's own."""

    is_gpu = True

    def __init__(self, place: str, dtype: torch.dtype) -> None:
        super().__init__(place if ":" in place else f"cuda:{torch.cuda.current_device()}", dtype)
        # Stages that share a process would wait for each other in the default stream.
        self.stream = torch.cuda.Stream(self.place)
        self._pool: Any = None

    def free_nbytes(self) -> int:
        return torch.cuda.mem_get_info(self.place)[0]

    def computing(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def put(self, numbers: npt.NDArray[Any], into: Tensor | None = None) -> Tensor:
        # What is pinned is given out again only when the copy from it is over.
        pinned = _tensor(numbers).pin_memory()
        if into is not None:
            return into.copy_(pinned, non_blocking=True)
        return pinned.to(self.place, non_blocking=True)

    def take(self, result: Tensor) -> Tensor:
        carried = self._carried(result)
        pinned = torch.empty(carried.shape, dtype=carried.dtype, pin_memory=True)
        pinned.copy_(carried, non_blocking=True)
        self.stream.synchronize()
        return pinned

    def captured(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return what replays a CUDA graph of a computation.

        Raises
        ------
        RuntimeError
            If it does what a graph can't hold, such as to wait for a number.
        """
        for _ in range(WARM_UPS):
            compute()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Others of this process may go on meanwhile. One pool serves all passes of a stage: each
        # one's result is taken before the next begins.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            result = compute()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def device_of(name: str, dtype: Dtype) -> Device:
    """Return the device of this name, which must be there.

    Raises
    ------
    ValueError
        If a CPU is to compute in 16 bits: it is slow at it, and changes what is generated.
    """
    check_dtype(dtype)
    if check_device(name) != CPU:
        return CudaDevice(name, getattr(torch, dtype))
    if dtype != "float32":
        raise ValueError(f"expected dtype='float32' on a CPU, got {dtype!r}: use a GPU for it")
    return Device()


def _tensor(numbers: npt.NDArray[Any]) -> Tensor:
    # torch can't look into memory that is read-only, as what came over a link may be.
    return torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy())
