"""How long it takes to open a deep model on many stages, and what of that is not the models."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from distributed import Client
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeinfer_dask.bench.hop import PassingSpec
from pipeinfer_dask.engine import Engine
from pipeinfer_dask.runtime.pipeline.dask_pipeline import DaskPipeline
from pipeinfer_dask.runtime.planning.clusters import call_on, loop_of, own_cluster, workers_of

LAYERS = 80
STAGES = 8
ROUNDS = 5
CLUSTER_TIMEOUT_S = 120.0
FILE_SIZE = "300KB"
"""Of each of the checkpoint's files: about one for each stage."""


def run_open_bench(
    layers: int = LAYERS, stages: int = STAGES, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Open engines on a cluster that stands, by turns with pipelines that load nothing.

    The model is a random one, as deep as large models are but narrow: what is measured is
    what does not grow with the weights.

    Parameters
    ----------
    layers, stages, rounds : int

    Returns
    -------
    dict
        ``{"suite": "open", "rows": [{"layers", "stages", "round", "open_s", "links_s"}]}``:
        seconds until an engine is open, and until a pipeline of as many stages without models
        is: actors, links and clocks. The last row has the medians; its ``round`` is None.
    """
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder, ExitStack() as resources:
        model = _deep_model(Path(folder), layers)
        client = own_cluster(stages, resources)
        client.wait_for_workers(stages, timeout=CLUSTER_TIMEOUT_S)
        workers = list(workers_of(client))
        for number in range(rounds):
            links = call_on(loop_of(client), _seconds_of_links(client, workers))
            began = time.perf_counter()
            with Engine.from_pretrained(model, client=client, stages=stages):
                opened = time.perf_counter() - began
            rows.append(_row(layers, stages, number, opened, links))
    open_s, links_s = (statistics.median(row[key] for row in rows) for key in ("open_s", "links_s"))
    rows.append(_row(layers, stages, None, open_s, links_s))
    return {"suite": "open", "rows": rows}


def _row(
    layers: int, stages: int, number: int | None, open_s: float, links_s: float
) -> dict[str, Any]:
    return {
        "layers": layers,
        "stages": stages,
        "round": number,
        "open_s": open_s,
        "links_s": links_s,
    }


async def _seconds_of_links(client: Client, workers: list[str]) -> float:
    began = time.perf_counter()
    pipeline = await DaskPipeline.open(client, [PassingSpec()] * len(workers), workers)
    took = time.perf_counter() - began
    await pipeline.close()
    return took


def _deep_model(path: Path, layers: int) -> Path:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=288,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path, max_shard_size=FILE_SIZE)
    words = {f"<{number}>": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path
