"""The model families that can be split into stages, and why others can't be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

SUPPORTED = frozenset({"llama", "mistral", "qwen2", "qwen3"})

RECURRENT = frozenset(
    {
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
        "zaya",
    }
)
"""Families whose state is more than keys and values: a rejected draft can't be taken out of it."""


def refusal(config: Mapping[str, Any]) -> str | None:
    """Say why a model of this ``config.json`` can't be split into stages; None where it can."""
    family = config.get("model_type")
    if family in SUPPORTED and not config.get("is_encoder_decoder"):
        if quantization := config.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            method = method or "unknown"
            return f"its weights are quantised ({method}); give a checkpoint in 16 or 32 bits"
        return None
    if family in RECURRENT:
        return f"{family} models are recurrent: a rejected draft can't be taken out of their state"
    if config.get("is_encoder_decoder"):
        return f"{family} models are encoder-decoders, and only decoder-only models can be split"
    return f"the {family} family is not known here; known are {', '.join(sorted(SUPPORTED))}"


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the family's own class of language models."""
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
