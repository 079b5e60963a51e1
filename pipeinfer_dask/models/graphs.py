"""Small passes of fixed sizes over buffers that stay in place: what a CUDA graph can replay.

A small run on a GPU is bound by launching kernels, one by one. A graph launches all of them
at once, but is bound to sizes and addresses: so runs are padded to a few sizes, the cache that
is looked at to a few lengths, and what comes in is copied into buffers of their own. All but
the capture itself is the same on a CPU, where the padded pass is simply computed.

What is given up: nobody can look between layers whether a run is still wanted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from pipeinfer_dask.models.devices import Device
from pipeinfer_dask.models.inputs import Inputs, Numbers, padded

SIZES = (1, 2, 4, 8)
"""Tokens of a pass; a run is padded to the next of them, and one beyond is not padded."""
BUCKET = 256
"""The filled part of the cache is looked at in multiples of so many slots."""


def padded_slots(capacity: int) -> int:
    """Return the slots of a cache of so much capacity in which every bucket has room."""
    return -(-capacity // BUCKET) * BUCKET + 1


class StaticPasses:
    """Passes by size and bucket, each made when it is first needed.

    Parameters
    ----------
    compute : callable
        Computes a pass over tensors on the device: [n, ...] for n tokens.
    device : Device
        Captures passes, or has them computed as they are.
    scratch : int
        The slot for what nobody looks at: the last of the cache.
    """

    def __init__(
        self, compute: Callable[[Inputs[Tensor]], Tensor], device: Device, scratch: int
    ) -> None:
        self._compute = compute
        self._device = device
        self._scratch = scratch
        self._passes: dict[tuple[int, int], tuple[Inputs[Tensor], Callable[[], Tensor]]] = {}
        self._failed = False

    def run(self, inputs: Inputs[Numbers]) -> Tensor | None:
        """Compute a pass, [n, ...]; the next one overwrites it.

        Returns None for what must be computed without: a run that is too long, or any if one
        could not be captured.
        """
        n, filled = inputs.allowed.shape
        if self._failed or n > SIZES[-1]:
            return None
        size = next(size for size in SIZES if size >= n)
        bucket = -(-filled // BUCKET) * BUCKET
        whole = padded(inputs, size, bucket, self._scratch)
        if (size, bucket) not in self._passes:
            buffers = Inputs(*(self._device.put(numbers) for numbers in whole))
            if buffers.given.is_floating_point():
                buffers = buffers._replace(given=buffers.given.to(self._device.dtype))
            try:
                replay = self._device.captured(lambda: self._compute(buffers))
            # What can't be captured differs by family, driver and version.
            except RuntimeError as error:
                self._failed = True
                warnings.warn(
                    "a pass could not be captured as a CUDA graph, and all are computed without: "
                    f"{' '.join(str(error).split())}",
                    stacklevel=2,
                )
                return None
            self._passes[size, bucket] = buffers, replay
        buffers, replay = self._passes[size, bucket]
        for buffer, numbers in zip(buffers, whole, strict=True):
            self._device.put(numbers, into=buffer)
        return replay()[:n]
