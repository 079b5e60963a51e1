"""Stages on a GPU say what stages on a CPU say. These tests need one, and skip without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pipeinfer_dask as pi
from pipeinfer_dask.models.demo_pair import DEMO_PROMPT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


def text(**options: Any) -> list[int]:
    pair = pi.demo_pair()
    strategy = options.pop("strategy", "pipeinfer")
    sampling = options.pop("sampling", {})
    with pi.Engine.from_pretrained(pair.target, pair.draft, stages=3, **options) as engine:
        result = engine.generate(DEMO_PROMPT, max_new_tokens=48, strategy=strategy, **sampling)
    return result.token_ids


@pytest.mark.parametrize("strategy", ["iterative", "pipeinfer", "adaptive"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_three_stages_on_one_card_say_what_a_cpu_says(strategy: str, cuda_graphs: bool) -> None:
    on_gpu = {"devices": "cuda:0", "dtype": "float32", "cuda_graphs": cuda_graphs}
    wanted = text(in_process=True, strategy=strategy)
    assert text(in_process=True, strategy=strategy, **on_gpu) == wanted


def test_a_pipeline_of_both_kinds_says_the_same() -> None:
    mixed = {"devices": ["cpu", "cuda:0", "cpu"], "dtype": None}
    assert text(in_process=True, **mixed) == text(in_process=True)


def test_samples_are_the_same() -> None:
    sampling = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
    on_gpu = {"devices": "cuda:0", "dtype": "float32"}
    wanted = text(in_process=True, sampling=sampling)
    assert text(in_process=True, sampling=sampling, **on_gpu) == wanted


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_generated_in(dtype: str) -> None:
    assert len(text(in_process=True, devices="cuda", dtype=dtype)) == 48


def test_a_card_without_room_is_refused_before_anything_is_loaded() -> None:
    taken = torch.empty(int(0.999 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
    with pytest.raises(MemoryError, match=r"on cuda of this process, got .* \(GPU "):
        text(in_process=True, devices="cuda", dtype="float32")
    del taken
    torch.cuda.empty_cache()


@pytest.mark.cluster
def test_workers_of_its_own_use_the_card() -> None:
    assert text(devices="cuda", dtype="float32") == text(in_process=True)
