"""How numbers get onto a device and off it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeinfer_dask.models.device_names import Dtype, check_device
from pipeinfer_dask.models.devices import Device, device_of


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", 0, None])
def test_a_device_that_nobody_knows_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"^expected a device as 'cpu', 'cuda' or 'cuda:N', got "):
        check_device(name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cpu_computes_in_32_bits_alone(dtype: Dtype) -> None:
    with pytest.raises(ValueError, match=rf"^expected dtype='float32' on a CPU, got '{dtype}': "):
        device_of("cpu", dtype)
    assert device_of("cpu", "float32").dtype == torch.float32


def test_float16_travels_as_it_is_and_bfloat16_as_float32() -> None:
    numbers = torch.tensor([[1.5, -2.0], [0.25, 3.0]]).T
    for dtype, travels in [
        (torch.float16, np.float16),
        (torch.bfloat16, np.float32),
        (torch.float32, np.float32),
    ]:
        taken = Device().take(numbers.to(dtype)).numpy()
        assert taken.dtype == travels
        assert taken.flags.c_contiguous
        assert taken.tolist() == [[1.5, 0.25], [-2.0, 3.0]]


def test_what_came_over_a_link_is_brought_into_a_buffer_of_the_devices_own_dtype() -> None:
    came = np.frombuffer(np.array([1.5, 2.5], np.float16).tobytes(), np.float16)
    assert not came.flags.writeable
    buffer = torch.zeros(2, dtype=torch.bfloat16)
    assert Device().put(came, into=buffer) is buffer
    assert buffer.tolist() == [1.5, 2.5]
    assert Device().put(came).dtype == torch.float16
