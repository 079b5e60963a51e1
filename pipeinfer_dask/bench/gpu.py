"""A pipeline of stages on one GPU beside what transformers does on it, with the same weights.

The target is a random Llama of seven billion parameters by default; the draft is its first
layers under the same embedding and head. Later layers are made to say less, so that the two
agree now and then, as the rows tell. One process, one request, greedy, by turns.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from pipeinfer_dask.engine import Engine
from pipeinfer_dask.models.device_names import CPU, Dtype
from pipeinfer_dask.runtime.planning.gpus import gpu_count
from pipeinfer_dask.testing import byte_tokenizer

LATER = 0.1
"""What the target's layers beyond the draft's write, relative to those."""
STRATEGIES = ("iterative", "speculative", "pipeinfer", "adaptive")


def run_gpu_bench(
    device: str = "cuda",
    *,
    hidden_size: int = 4096,
    intermediate_size: int = 11_008,
    layers: int = 32,
    draft_layers: int = 2,
    head_dim: int = 128,
    context: int = 2048,
    vocab_size: int = 32_000,
    stages: int = 3,
    dtype: Dtype = "float16",
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measure tokens a second.

    Parameters
    ----------
    device : str
        ``"cuda"``, ``"cuda:N"``, or ``"cpu"`` to try the benchmark itself.
    hidden_size, intermediate_size, layers, head_dim, context, vocab_size : int
        Of the target.
    draft_layers : int
    stages : int
    dtype : {"float32", "float16", "bfloat16"}
        What is stored and computed in.
    prompt_tokens, new_tokens : int
    repeats : int
        Generations of each kind after a first; medians are reported.

    Returns
    -------
    dict
        ``{"suite": "gpu", "device", "parameters", "dtype", "rows": [{"by", "how",
        "tokens_per_s", "same_tokens", "acceptance_rate"}]}``; the tokens that are the same as
        transformers' plain ones, from the first on: in 16 bits they may part.

    Raises
    ------
    ValueError
        If there is no such GPU.
    """
    if device != CPU and gpu_count() == 0:
        raise ValueError("expected a GPU that torch can use, got none: run this suite where one is")
    logging.disable_progress_bar()
    prompt = [(7 * i * i + 3 * i) % vocab_size for i in range(prompt_tokens)]
    try:
        with TemporaryDirectory() as directory:
            target, draft = Path(directory) / "target", Path(directory) / "draft"
            config = LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_hidden_layers=layers,
                num_attention_heads=hidden_size // head_dim,
                num_key_value_heads=hidden_size // head_dim,
                head_dim=head_dim,
                max_position_embeddings=context,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
            parameters = _make(config, draft_layers, dtype, device, target, draft)
            plain, rows = _transformers((target, draft), dtype, device, prompt, new_tokens, repeats)
            gc.collect()
            if device != CPU:  # the engine is to have the whole card
                torch.cuda.empty_cache()
            for graphs in (False, True) if device != CPU else (False,):
                with Engine.from_pretrained(
                    target,
                    draft,
                    stages=stages,
                    in_process=True,
                    devices=device,
                    dtype=dtype,
                    cuda_graphs=graphs,
                    progress=False,
                ) as engine:
                    rows += [
                        _ours(engine, name, graphs, plain, prompt, new_tokens, repeats)
                        for name in STRATEGIES
                    ]
    finally:
        logging.enable_progress_bar()
    name = CPU if device == CPU else torch.cuda.get_device_name(device)
    return {
        "suite": "gpu",
        "device": name,
        "parameters": parameters,
        "dtype": dtype,
        "rows": rows,
    }


def _make(
    config: LlamaConfig, draft_layers: int, dtype: Dtype, device: str, target: Path, draft: Path
) -> int:
    """Save a random target and its draft; return the target's parameters."""
    with torch.device(device), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        for layer in model.model.layers[draft_layers:]:
            layer.self_attn.o_proj.weight.mul_(LATER)
            layer.mlp.down_proj.weight.mul_(LATER)
    model.save_pretrained(target)
    parameters: int = sum(parameter.numel() for parameter in model.parameters())
    model.model.layers = model.model.layers[:draft_layers]
    model.config.num_hidden_layers = draft_layers
    model.save_pretrained(draft)
    for folder in (target, draft):
        byte_tokenizer(config.vocab_size).save_pretrained(folder)
    return parameters


def _transformers(
    paths: tuple[Path, Path],
    dtype: Dtype,
    device: str,
    prompt: list[int],
    new_tokens: int,
    repeats: int,
) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the plain tokens, and what was measured."""
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)) for path in paths
    ]
    whole, small = (model.to(device).eval() for model in models)
    ids = torch.tensor([prompt], device=device)

    def generate(**options: Any) -> list[int]:
        output = whole.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            **options,
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()  # waits for the device
        return tokens

    plain, rate = _timed(generate, repeats)
    assisted, assisted_rate = _timed(lambda: generate(assistant_model=small), repeats)
    rows = [
        _row("transformers", "generate", rate, plain, plain, None),
        _row("transformers", "assisted", assisted_rate, plain, assisted, None),
    ]
    return plain, rows


def _ours(
    engine: Engine,
    strategy: str,
    graphs: bool,
    plain: list[int],
    prompt: list[int],
    new_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    rates: list[float | None] = []

    def generate() -> list[int]:
        result = engine.generate(prompt, max_new_tokens=new_tokens, strategy=strategy)
        rates.append(result.metrics.acceptance_rate)
        return result.token_ids

    tokens, rate = _timed(generate, repeats)
    how = f"{strategy}, CUDA graphs" if graphs else strategy
    return _row("pipeinfer_dask", how, rate, plain, tokens, rates[-1])


def _row(
    by: str,
    how: str,
    tokens_per_s: float,
    plain: list[int],
    tokens: list[int],
    acceptance_rate: float | None,
) -> dict[str, Any]:
    def same(pair: tuple[int, int]) -> bool:
        return pair[0] == pair[1]

    return {
        "by": by,
        "how": how,
        "tokens_per_s": round(tokens_per_s, 2),
        "same_tokens": sum(1 for _ in takewhile(same, zip(plain, tokens, strict=True))),
        "acceptance_rate": acceptance_rate,
    }


def _timed(generate: Callable[[], list[int]], repeats: int) -> tuple[list[int], float]:
    """Return what is generated, and the median of tokens a second."""
    tokens = generate()
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        tokens = generate()
        rates.append(len(tokens) / (time.perf_counter() - began))
    return tokens, statistics.median(rates)
