from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeinfer_dask.models.checkpoint import open_checkpoint
from pipeinfer_dask.models.experts import PackedExperts, holds_experts
from pipeinfer_dask.models.linears import PackedLinear, has_kernels
from pipeinfer_dask.models.packing import pack
from pipeinfer_dask.models.shard import Shard
from tests.families import FAMILIES
from tests.tiny import make_tiny

pytestmark = pytest.mark.skipif(not has_kernels(), reason="torch has no FBGEMM kernels here")

INTERFACE = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
HIDDEN, EXPERTS, CHOSEN = 32, 4, 2


def checkpoint(path: Path, variant: str, dtype: torch.dtype = torch.float16) -> Path:
    family, config = FAMILIES[variant]
    return make_tiny(path, family, layers=4, seed=1, dtype=dtype, **config)


def model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)


def experts_of(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, PackedExperts) or holds_experts(m))


def routed(n: int) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(n)
    chances = torch.rand(n, EXPERTS, generator=made)
    weights, index = chances.topk(CHOSEN)
    return torch.randn(n, HIDDEN, generator=made), index, weights


@pytest.mark.parametrize("variant", INTERFACE)
def test_packed_experts_give_what_the_familys_own_give_and_but_for_roundings_alone(
    variant: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, variant)
    own, changed = model(path), model(path)
    pack(changed, everything=True, threads=1)
    family, packed = experts_of(own), experts_of(changed)
    assert isinstance(packed, PackedExperts)
    for n in (1, 2, 7):
        x, index, weights = routed(n)
        with torch.inference_mode():
            together = packed(x, index, weights)
            alone = [packed(*(part[i : i + 1] for part in (x, index, weights))) for i in range(n)]
            torch.testing.assert_close(together, family(x, index, weights), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_experts_that_are_given_all_tokens_leave_out_those_multiplied_by_zero(
    tmp_path: Path,
) -> None:
    path = checkpoint(tmp_path, "llama4")
    own, changed = model(path), model(path)
    pack(changed, everything=True, threads=1)
    family, packed = experts_of(own), experts_of(changed)
    asked = calls(packed)
    n = 3
    x = torch.randn(EXPERTS, n, HIDDEN, generator=torch.Generator().manual_seed(1))
    x[0] = x[3] = x[1, 1:] = 0
    with torch.inference_mode():
        given = x.view(-1, HIDDEN)
        torch.testing.assert_close(packed(given), family(given), rtol=1e-5, atol=1e-5)
        assert asked == [1, 2, 1, 2]
        assert not packed(torch.zeros(EXPERTS, HIDDEN)).any()


def calls(packed: PackedExperts) -> list[int]:
    """Note which experts multiply, in order."""
    asked: list[int] = []
    for matrices in (packed.up, packed.down):
        for number, matrix in enumerate(matrices):
            matrix.register_forward_hook(lambda *_, number=number: asked.append(number))
    return asked


def test_only_the_experts_that_tokens_chose_are_computed(tmp_path: Path) -> None:
    changed = model(checkpoint(tmp_path, "mixtral"))
    pack(changed, everything=True, threads=1)
    packed = experts_of(changed)
    asked = calls(packed)
    index = torch.tensor([[3, 1], [1, 3], [3, 1]])
    packed(torch.ones(3, HIDDEN), index, torch.ones(3, CHOSEN))
    assert asked == [1, 3, 1, 3]


@pytest.mark.parametrize("variant", [*INTERFACE, "llama4"])
def test_a_shard_of_16_bits_has_its_experts_packed_and_one_of_32_bits_on_request(
    variant: str, tmp_path: Path
) -> None:
    wide = checkpoint(tmp_path / "32", variant, torch.float32)
    narrow = checkpoint(tmp_path / "16", variant, torch.bfloat16)

    def held(path: Path, **options: Any) -> set[type[nn.Module]]:
        shard = Shard.load(path, range(4), capacity=8, **options)
        return {
            type(module)
            for module in shard.modules()
            if isinstance(module, PackedExperts) or holds_experts(module)
        }

    assert held(narrow) == held(wide, weights="fp16") == {PackedExperts}
    assert PackedExperts not in held(wide) | held(narrow, weights="fp32")


def test_experts_of_16_bits_are_packed_beside_a_router_of_32_bits(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", "mixtral", torch.bfloat16)
    file = path / "model.safetensors"
    tensors = load_file(file)
    routers = [name for name in tensors if name.endswith("gate.weight")]
    assert routers
    save_file(tensors | {name: tensors[name].float() for name in routers}, file, {"format": "pt"})
    shard = Shard.load(path, range(4), capacity=8)
    assert any(isinstance(module, PackedExperts) for module in shard.modules())
    assert open_checkpoint(path).narrow


def test_only_the_expert_that_is_beyond_float16_stays_in_32_bits(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "gpt_oss")
    own, changed = model(path), model(path)
    for one in (own, changed):
        experts_of(one).down_proj.data[2, 0, 0] = 1e5
    pack(changed, everything=True, threads=1)
    packed = experts_of(changed)
    kinds = [type(matrix) for matrix in packed.down]
    assert kinds == [PackedLinear, PackedLinear, nn.Linear, PackedLinear]
    inputs = routed(5)
    with torch.inference_mode():
        torch.testing.assert_close(packed(*inputs), experts_of(own)(*inputs), rtol=1e-5, atol=1e-2)
