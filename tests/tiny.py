"""Tiny random checkpoints, complete with a tokenizer: the models that tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

TINY_VOCABULARY = 288
"""The 256 bytes, and some tokens that no text is split into."""

END_OF_TEXT = "<|endoftext|>"
"""The last token. Some families' tokenizers add it where it is not there."""


def make_tiny(
    path: Path,
    model_type: str,
    *,
    layers: int,
    seed: int,
    vocab_size: int = TINY_VOCABULARY,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    norms: float = 0.0,
    padded_to: int | None = None,
    **config: Any,
) -> Path:
    """Save a random model of a family, with a byte-level tokenizer, and return its directory.

    Parameters
    ----------
    path : Path
        Directory to write to; made when it is not there.
    model_type : str
        The family's name in transformers, such as ``"llama"``.
    layers : int
        Decoder layers.
    seed : int
        Two models of the same configuration and seed are the same.
    vocab_size : int, at least 257
    dtype : torch.dtype
        What the weights are stored in.
    max_shard_size : str
        Where to break the weights into several files.
    padded_to : int, optional
        Rows of embedding and head, where there are more than the tokenizer has tokens.
    norms : float
        How far the weights of norms lie from 1.
    **config
        Further fields of the family's configuration; they win over the tiny ones.
        No token ends a generation unless ``eos_token_id`` is among them.
    """
    fields = tiny_fields(model_type, layers=layers, vocab_size=padded_to or vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **fields | config)
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
            elif norms and parameter.dim() == 1:
                parameter.data += norms * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    _byte_tokenizer(vocab_size).save_pretrained(path)
    return path


def tiny_fields(
    model_type: str, *, layers: int, vocab_size: int = TINY_VOCABULARY
) -> dict[str, Any]:
    """Return a family's configuration, made small."""
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        # Wide enough that the greedy text depends on its context.
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if isinstance(getattr(CONFIG_MAPPING[model_type], "head_dim", None), property):
        del fields["head_dim"]  # told by the number of heads
    return fields


def _byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"<{i}>" for i in range(len(alphabet), vocab_size - 1)] + [END_OF_TEXT]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
