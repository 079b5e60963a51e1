import gc
import subprocess
import sys
import threading
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

from pipeinfer_dask.models import linears, packing
from pipeinfer_dask.models.demo_pair import demo_pair
from pipeinfer_dask.models.helpers import Helpers
from pipeinfer_dask.models.linears import PackedLinear, StoredEmbedding, has_kernels, together
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.protocol.messages import Batch
from tests.tiny import make_tiny

pytestmark = pytest.mark.skipif(not has_kernels(), reason="torch has no FBGEMM kernels here")


def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (48, 32), (130, 515)])
@pytest.mark.parametrize("n", [1, 2, 6, 7, 33])
def test_a_product_is_that_of_the_float32_matrix(
    shape: tuple[int, int], n: int, dtype: torch.dtype
) -> None:
    weight, bias, x = random(*shape, dtype=dtype), random(shape[0]), random(1, n, shape[1]).float()
    wanted = F.linear(x, weight.float(), bias.float())
    torch.testing.assert_close(PackedLinear(weight, bias)(x), wanted, rtol=1e-4, atol=1e-4)
    wanted = F.linear(x, weight.float())
    torch.testing.assert_close(PackedLinear(weight, None)(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [2, 5, 6, 8, 40])
def test_a_token_has_the_same_product_alone_and_among_others_but_for_roundings(n: int) -> None:
    linear, x = PackedLinear(random(96, 700), random(96)), random(n, 700).float()
    alone = torch.cat([linear(row) for row in x.split(1)])
    # With AVX-512 to the last bit; kernels of AVX2 sum one or two rows in an order of their own.
    roundings = 1e-6 * (x.abs() @ random(96, 700).float().abs().T)
    assert (linear(x) - alone).abs().le(roundings).all()


@pytest.mark.parametrize(("threads", "largest"), [(1, 600), (2, 2**24), (3, 2**24), (3, 600)])
def test_neither_threads_nor_parts_change_a_bit(
    threads: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias, x = random(50, 64), random(50), random(3, 64).float()
    whole = PackedLinear(weight, bias)(x)
    monkeypatch.setattr(linears, "SMALLEST_PART", 256)
    monkeypatch.setattr(linears, "LARGEST_PART", largest)
    shared = PackedLinear(weight, bias, helpers=Helpers(threads))
    assert torch.equal(shared(x), whole)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linears_of_one_input_give_together_what_each_gives_alone(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linears, "SMALLEST_PART", 256)
    helpers, x = Helpers(threads), random(1, 3, 64).float()
    several = [PackedLinear(random(n, 64), random(n), helpers=helpers) for n in (50, 3, 40, 7)]
    for one, wanted in zip(together(several)(x), several, strict=True):
        assert torch.equal(one, wanted(x))
    wide = [nn.Linear(64, 5).requires_grad_(False), *several]
    assert [one.shape[-1] for one in together(wide)(x)] == [5, 50, 3, 40, 7]


def test_the_smallest_bfloat16_values_lose_no_more_than_half_of_float16s_smallest() -> None:
    values = torch.tensor([[2.0**-i * 1.5 for i in range(10, 40)]], dtype=torch.bfloat16)
    held = PackedLinear(values, None)(torch.eye(30))
    error = (held[:, 0] - values[0].float()).abs()
    assert error.max() <= 2**-25
    assert error[:5].max() == 0


@pytest.mark.parametrize("value", [65536.0, -1e30, float("inf"), float("nan")])
def test_a_matrix_beyond_float16_is_refused(value: float) -> None:
    weight = random(4, 4, dtype=torch.bfloat16)
    weight[2, 1] = value
    with pytest.raises(OverflowError, match="beyond float16"):
        PackedLinear(weight, None)


def kinds_held(shard: Shard) -> dict[str, int]:
    """Count the modules of a shard that compute by matrices."""
    kinds = (PackedLinear, StoredEmbedding, nn.Linear, nn.Embedding)
    named = [type(module).__name__ for module in shard.modules() if type(module) in kinds]
    return {name: named.count(name) for name in set(named)}


def load(path: Path, **options: Any) -> Shard:
    return Shard.load(path, range(2), capacity=64, **options)


def logits(shard: Shard, text: tuple[int, ...], start: int = 0) -> Tensor:
    places = tuple(range(start, start + len(text)))
    result = shard.logits(
        Batch(text, places, places, tuple(place - 1 for place in places)), len(text), bool
    )
    assert result is not None
    return result


def test_a_checkpoint_of_16_bits_is_packed_and_one_of_32_bits_on_request(tmp_path: Path) -> None:
    narrow = make_tiny(tmp_path / "16", "llama", layers=2, seed=1, dtype=torch.float16)
    wide = make_tiny(tmp_path / "32", "llama", layers=2, seed=1)
    packed = {"PackedLinear": 15, "StoredEmbedding": 1}
    assert kinds_held(load(narrow)) == packed
    assert kinds_held(load(wide)) == {"Linear": 15, "Embedding": 1}
    assert kinds_held(load(narrow, weights="fp32")) == {"Linear": 15, "Embedding": 1}
    rounded = load(wide, weights="fp16")
    assert kinds_held(rounded) == {"PackedLinear": 15, "Embedding": 1}
    text = tuple(range(20))
    exact = logits(load(narrow, weights="fp32"), text)
    torch.testing.assert_close(logits(load(narrow), text), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(rounded, text), exact, rtol=0.05, atol=0.05)


def test_only_the_matrix_that_is_beyond_float16_stays_in_32_bits(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "qwen2", layers=2, seed=1, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(path)
    shard = load(path)
    assert kinds_held(shard) == {"PackedLinear": 14, "Linear": 1, "StoredEmbedding": 1}
    wide = load(path, weights="fp32")
    text = tuple(range(20))
    torch.testing.assert_close(logits(shard, text), logits(wide, text), rtol=1e-4, atol=1e-4)


def test_linears_written_in_a_familys_own_way_are_packed_where_they_compute_the_same() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert packing._is_linear(FalconLinear(2, 2))
    assert not packing._is_linear(Scaled(2, 2))


def test_where_torch_has_no_kernels_auto_computes_in_32_bits_and_fp16_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny(tmp_path, "llama", layers=2, seed=1, dtype=torch.float16)
    has_kernels.cache_clear()
    with monkeypatch.context() as patched:
        patched.delattr(torch, "fbgemm_pack_gemm_matrix_fp16")
        assert kinds_held(load(path)) == {"Linear": 15, "Embedding": 1}
        with pytest.raises(ValueError, match="expected weights='auto' or 'fp32'"):
            load(path, weights="fp16")
    has_kernels.cache_clear()


MEMORY = """
import sys
import threading
from pathlib import Path
import psutil, torch
torch.set_num_threads(1)
from pipeinfer_dask.models.shard import Shard
memory = psutil.Process().memory_full_info
Shard.load(Path(sys.argv[1]), range(1), capacity=8)  # what libraries take once
before = memory().uss
shard = Shard.load(Path(sys.argv[2]), range(int(sys.argv[3])), capacity=8)
print(memory().uss - before)
"""


@pytest.mark.parametrize(
    ("family", "layers", "config"), [("llama", 4, {}), ("mixtral", 1, {"num_local_experts": 8})]
)
def test_a_worker_holds_a_16_bit_shard_in_its_16_bits(
    family: str, layers: int, config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"dtype": torch.bfloat16}
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 4096}
    small = make_tiny(tmp_path / "small", family, layers=1, seed=1, **config)
    large = make_tiny(tmp_path / "large", family, layers=layers, seed=1, **config, **sizes)
    stored = (large / "model.safetensors").stat().st_size
    assert stored > 50e6
    child = subprocess.run(
        [sys.executable, "-c", MEMORY, small, large, str(layers)],
        capture_output=True,
        text=True,
        check=True,
    )
    held = int(child.stdout)
    assert 0.8 * stored < held < 1.1 * stored


def test_greedy_tokens_of_the_demo_pair_are_the_same_one_by_one_and_several_at_once() -> None:
    shard = Shard.load(demo_pair().target, range(6), capacity=320)
    text = list(range(100, 120))
    picked = logits(shard, tuple(text))[-1:]
    alone = [picked]
    while len(text) < 300:
        text.append(int(picked.argmax()))
        picked = logits(shard, tuple(text[-1:]), len(text) - 1)
        alone.append(picked)
    logits(shard, tuple(text[:20]))
    together, start = [], 20
    for size in cycle((2, 3, 4, 5, 6, 7, 8, 16)):
        if start >= len(text):
            break
        together.append(logits(shard, tuple(text[start : start + size]), start))
        start += size
    one_by_one, at_once = torch.cat(alone[1:]), torch.cat(together)
    assert at_once.argmax(-1).tolist() == one_by_one.argmax(-1).tolist()
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=1e-4)


def test_matrices_that_lie_the_other_way_round_are_packed(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "gpt2", layers=2, seed=1)
    model, ids = AutoModelForCausalLM.from_pretrained(path), torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        exact = model(ids).logits
        packing.pack(model, everything=True, threads=1)
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 9
        torch.testing.assert_close(model(ids).logits, exact, rtol=0.05, atol=0.05)


def test_threads_of_a_shard_share_its_products_and_end_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linears, "SMALLEST_PART", 256)
    path = make_tiny(tmp_path, "llama", layers=2, seed=1, dtype=torch.float16)
    text = tuple(range(20))
    shard = load(path, threads=3)
    assert torch.equal(logits(shard, text), logits(load(path), text))
    started = [thread for thread in threading.enumerate() if thread.name.startswith("helper")]
    assert len(started) == 2
    del shard
    gc.collect()
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
