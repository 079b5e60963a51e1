"""Whether a model of these settings says the same in stages as in one piece: tried out.

The model is a random one of the same family and settings, of a few narrow layers, so it
takes a moment. It goes the way of the real one: a checkpoint on disk, read share by share.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from pipeinfer_dask.models.checkpoint import Checkpoint
from pipeinfer_dask.models.families import model_class
from pipeinfer_dask.models.layers import split_layers
from pipeinfer_dask.models.quiet import without_progress_bars
from pipeinfer_dask.models.shard import Shard, building
from pipeinfer_dask.models.stage import HiddenStates
from pipeinfer_dask.protocol.messages import NO_PARENT, Batch

VOCABULARY, LAYERS, KEY_HEADS, GROUPS, WIDTH, EXPERTS, WINDOW = 64, 3, 2, 3, 32, 16, 8
"""How large the small model is at most."""

ALIGNMENT = 16

WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size_mlp",
    "ffn_hidden_size",
    "ffn_dim",
    "n_inner",
)
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "floor_scale")
LISTS_OF_LAYERS = ("moe_layers", "mlp_only_layers")
"""Lists of the layers that are somehow; other lists have an entry for each layer."""

CLOSE = 1e-3
"""How far logits may differ, in their standard deviations. Rounding makes 1e-5 to 1e-4 of it."""


def check_split(checkpoint: Checkpoint) -> None:
    """Try out whether models of these settings can be split; what was tried is not tried again.

    Raises
    ------
    ValueError
        If the stages say something else than the whole model, or it can't be made small.
    """
    family, path = checkpoint.model_type, checkpoint.path
    try:
        small = shrunk(checkpoint.config).to_dict()
        difference = _difference(family, json.dumps(small, default=str, sort_keys=True))
    # A configuration can be beyond us in as many ways as there are families.
    except Exception as error:
        raise ValueError(
            f"no small {family} model of the settings in {path} could be tried out "
            f"({type(error).__name__}: {' '.join(str(error).split())}): use self_test=False to go "
            "without"
        ) from error
    if not difference < CLOSE:
        raise ValueError(
            f"expected a small {family} model of the settings in {path} to say the same in stages "
            f"as in one piece, got logits that differ by {difference:.1g} standard deviations: use "
            "another model, or self_test=False to use this one all the same"
        )


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration of a small model that is special in every way that this one is.

    Heads keep their size, which much else goes by; their numbers become smaller, and the
    model narrower with them. A layer of each kind stays.
    """
    small: Any = deepcopy(config)
    small.name_or_path, small.dtype = "", None
    heads = config.num_attention_heads
    kept_heads = min(heads, KEY_HEADS)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if key_heads := getattr(config, name, None):
            kept_heads = min(key_heads, KEY_HEADS) * min(heads // key_heads, GROUPS)
            setattr(small, name, min(key_heads, KEY_HEADS))
    small.num_attention_heads = kept_heads
    small.hidden_size = config.hidden_size // heads * kept_heads
    if vars(config).get("head_dim"):  # then the width is free: experts need an even one
        small.hidden_size = math.ceil(small.hidden_size / ALIGNMENT) * ALIGNMENT
    if hasattr(config, "word_embed_proj_dim"):
        projected = config.word_embed_proj_dim != config.hidden_size
        small.word_embed_proj_dim = small.hidden_size // 2 if projected else small.hidden_size
    for name in WIDTHS:
        _lower(small, name, WIDTH)
    for name in WINDOWS:
        _lower(small, name, WINDOW)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        _lower(small, name, EXPERTS)
    # A bound that no score of a small model comes near would not be tried out.
    if getattr(config, "attn_logit_softcapping", None):
        small.attn_logit_softcapping = 1.0
    small.vocab_size = VOCABULARY
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    _keep_layers(small)
    result: PreTrainedConfig = small
    return result


def _lower(config: Any, name: str, limit: int) -> None:
    if isinstance(value := getattr(config, name, None), int):
        setattr(config, name, min(value, limit))


def _keep_layers(config: Any) -> None:
    """Leave one layer of each kind, and a few more."""
    total = config.num_hidden_layers
    entries = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == total and name not in LISTS_OF_LAYERS
    }
    members = {name: getattr(config, name, None) or [] for name in LISTS_OF_LAYERS}
    dense = getattr(config, "first_k_dense_replace", 0)

    def kind(layer: int) -> str:
        listed = [layer in layers for layers in members.values()]
        return repr([*(value[layer] for value in entries.values()), *listed, layer < dense])

    kinds: dict[str, int] = {}
    for layer in range(total):
        kinds.setdefault(kind(layer), layer)
    others = [layer for layer in range(total) if layer not in kinds.values()]
    kept = sorted([*kinds.values(), *others[: max(0, LAYERS - len(kinds))]])
    config.num_hidden_layers = len(kept)
    for name, value in entries.items():
        setattr(config, name, [value[layer] for layer in kept])
    for name, layers in members.items():
        if layers:
            setattr(config, name, [new for new, layer in enumerate(kept) if layer in layers])
    if dense:
        config.first_k_dense_replace = sum(layer < dense for layer in kept)
    if hasattr(config, "attention_types"):  # GPT-Neo's lists are made of this one
        config.attention_types = [[config.attention_layers, 1]]


@cache
def _difference(family: str, fields: str) -> float:
    """Return how far a random model's logits in stages are from its own, at most."""
    config: PreTrainedConfig = CONFIG_MAPPING[family].from_dict(json.loads(fields))
    layers: int = config.num_hidden_layers
    with TemporaryDirectory() as directory, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with building, without_progress_bars():
            whole = _random(model_class(config)(config))
            whole.save_pretrained(directory)
        stages = [
            Shard.load(Path(directory), share, capacity=2 * len(TEXT))
            for share in split_layers(layers, min(layers, LAYERS))
        ]
    with torch.inference_mode():
        first, second = (_logits(whole, (*TEXT, *branch)) for branch in BRANCHES)
    own = torch.cat([first, second[len(TEXT) :]])
    got = torch.cat([_through(stages, batch) for batch in _batches()])
    return float((got - own).abs().max() / own.std())


TEXT = tuple((7 * place * place + 3 * place) % VOCABULARY for place in range(3 * WINDOW))
BRANCHES = ((11, 12, 13), (21, 22, 23))
"""A text longer than any window, and two ways in which it goes on."""


def _batches() -> list[Batch]:
    """Return the text in two chunks and then both branches, in slots from last to first."""
    n = len(TEXT)
    slots = tuple(reversed(range(n)))
    text = Batch(TEXT, tuple(range(n)), slots, (NO_PARENT, *slots[:-1]))
    one, other = (n + 4, n + 1, n + 2), (n + 3, n, n + 5)
    tree = Batch(
        tuple(token for branch in BRANCHES for token in branch),
        (n, n + 1, n + 2) * 2,
        (*one, *other),
        (slots[-1], *one[:-1], slots[-1], *other[:-1]),
    )
    return [text[: WINDOW + 2], text[WINDOW + 2 :], tree]


def _random(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model whose every part matters: fresh ones hardly attend, and their norms are 1."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=model.config.hidden_size**-0.5)
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval()
    return model


def _logits(model: Any, tokens: tuple[int, ...]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def _through(stages: list[Shard], batch: Batch) -> Tensor:
    hidden: HiddenStates | None = None
    for stage in stages[:-1]:
        hidden = stage.run(batch, hidden, picks=len(batch), stopped=bool).hidden
    logits = stages[-1].logits(batch, len(batch), bool, hidden=hidden)
    assert logits is not None
    return logits
