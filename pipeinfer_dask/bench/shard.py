"""What a stage's pass costs beside the family's own, and how much of it is not multiplying.

Both compute with the same random float16 weights, in float32, on one thread, by turns. Times are
of that thread's processor, so that what else the machine does hardly matters. The small size is
nearly all overhead, the large one is bound by reading weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from pipeinfer_dask.models.families import SUPPORTED
from pipeinfer_dask.models.linears import PackedLinear
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.protocol.messages import Batch

FAMILIES = tuple(sorted(SUPPORTED))
HIDDEN_SIZES = (256, 2048)
TOKENS = (1, 2, 4, 6, 8, 64)
LAYERS = 3
CONTEXT = 128
"""Tokens that every pass attends to beside its own."""


def run_shard_bench(
    families: Sequence[str] = FAMILIES,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    tokens: Sequence[int] = TOKENS,
    *,
    repeats: int = 7,
) -> dict[str, Any]:
    """Measure passes of a whole model of few layers and a small vocabulary.

    Parameters
    ----------
    families : sequence of str
    hidden_sizes : sequence of int
        Widths, multiples of 64.
    tokens : sequence of int
        Tokens of a pass.
    repeats : int
        Passes of each kind, by turns; medians are reported.

    Returns
    -------
    dict
        ``{"suite": "shard", "rows": [{"family", "hidden_size", "tokens", "ours_ms",
        "transformers_ms", "ratio", "linears_ms", "transformers_linears_ms",
        "overhead_ratio"}]}``. The ratios are ours to transformers'; the overhead is what a pass
        takes beyond its products by matrices, None for a mixture of experts.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        with torch.inference_mode():
            rows = [
                row
                for family in families
                for hidden_size in hidden_sizes
                for row in _measure(family, hidden_size, tokens, repeats)
            ]
    finally:
        torch.set_num_threads(threads)
        logging.enable_progress_bar()
    return {"suite": "shard", "rows": rows}


def _measure(
    family: str, hidden_size: int, tokens: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    config = _config(family, hidden_size)
    with TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(config).half().save_pretrained(directory)
        shard = Shard.load(Path(directory), range(LAYERS), capacity=CONTEXT + max(tokens))
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        text = tuple(i % config.vocab_size for i in range(CONTEXT + max(tokens)))
        shard.logits(_chain(text[:CONTEXT], 0), 1, bool)
        cache = DynamicCache(config=config)
        model(torch.tensor([text[:CONTEXT]]), past_key_values=cache)
        return [
            {"family": family, "hidden_size": hidden_size}
            | _compare(shard, model, cache, text[CONTEXT : CONTEXT + n], repeats)
            for n in tokens
        ]


def _config(family: str, hidden_size: int) -> PreTrainedConfig:
    """Return a configuration of few layers: heads of 64, four queries to a key."""
    heads = hidden_size // 64
    fields: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 11 // 4,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    kind = CONFIG_MAPPING[family]
    if isinstance(getattr(kind, "head_dim", None), property):
        del fields["head_dim"]  # told by the number of heads
    experts = {
        "num_experts": 8,
        "num_local_experts": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": hidden_size // 2,
    }
    special: dict[str, dict[str, Any]] = {
        "deepseek_v3": {
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": heads,
            **experts,
        },
        "falcon": {"new_decoder_architecture": True, "num_kv_heads": heads // 4},
        "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
        # A window that was full could not be cropped between the turns.
        "gpt_oss": {"sliding_window": 2048, "rope_parameters": {"rope_type": "default"}, **experts},
        "llama4_text": {
            "intermediate_size_mlp": hidden_size * 11 // 4,
            **experts,
            "num_experts_per_tok": 1,
        },
        "mixtral": experts,
        "opt": {"ffn_dim": hidden_size * 4, "word_embed_proj_dim": hidden_size},
        "qwen3_moe": experts,
    }
    return kind(**fields | special.get(family, {}))


def _compare(
    shard: Shard, model: Any, cache: DynamicCache, text: tuple[int, ...], repeats: int
) -> dict[str, Any]:
    n = len(text)
    batch, ids = _chain(text, CONTEXT), torch.tensor([text])
    packed = [_product(module, n) for module in shard.modules() if _multiplies(module)]
    plain = [_product(module, n) for module in model.modules() if _multiplies(module)]
    kinds: dict[str, Callable[[], object]] = {
        "ours": lambda: shard.logits(batch, n, bool),
        "transformers": lambda: model(ids, past_key_values=cache),
        "linears": lambda: [product() for product in packed],
        "transformers_linears": lambda: [product() for product in plain],
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        for name, compute in kinds.items():
            began = time.thread_time()
            compute()
            took = 1e3 * (time.thread_time() - began)
            if name == "transformers":
                cache.crop(-n)
            if turn > 0:  # the first allocates
                times[name].append(took)
    ours, theirs, linears, their_linears = map(statistics.median, times.values())
    return {
        "tokens": n,
        "ours_ms": round(ours, 3),
        "transformers_ms": round(theirs, 3),
        "ratio": round(ours / theirs, 3),
        "linears_ms": round(linears, 3),
        "transformers_linears_ms": round(their_linears, 3),
        # Products by experts are in none of the two sums.
        "overhead_ratio": None
        if _has_experts(model)
        else round((ours - linears) / (theirs - their_linears), 3),
    }


def _chain(tokens: tuple[int, ...], start: int) -> Batch:
    places = tuple(range(start, start + len(tokens)))
    return Batch(tokens, places, places, tuple(place - 1 for place in places))


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, (PackedLinear, nn.Linear, Conv1D))


def _has_experts(model: nn.Module) -> bool:
    return any(parameter.dim() > 2 for parameter in model.parameters())


def _product(module: Any, n: int) -> Callable[[], object]:
    rows = module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features
    x = torch.ones(1, n, rows)
    return lambda: module(x)
