"""The model families that can be split into stages, and why others can't be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeinfer_dask.models.specials import (
    Special,
    alibi_by_slot,
    register_falcon,
    register_gpt_neo,
    register_gptj,
    tell_positions,
)

SUPPORTED = frozenset(
    {
        "bloom",
        "cohere",
        "deepseek_v3",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "llama",
        "llama4_text",
        "mistral",
        "mixtral",
        "mpt",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)

SPECIAL = {
    "bloom": Special(adapt=alibi_by_slot("alibi"), context=2048),
    "falcon": Special(prepare=register_falcon),
    "gpt_neo": Special(prepare=register_gpt_neo),
    "gptj": Special(prepare=register_gptj),
    "llama4_text": Special(adapt=tell_positions),
    "mpt": Special(adapt=alibi_by_slot("position_bias")),
    "opt": Special(after=frozenset({"final_layer_norm", "project_out"})),
}
"""The families that need more than the rest."""

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
    if isinstance(text := config.get("text_config"), dict):
        return (
            f"{family} models take more than text; give a checkpoint of the text model alone, "
            f"such as one of {text.get('model_type', 'its own family')}"
        )
    if config.get("auto_map"):
        return (
            f"the {family} family is known only to code that comes with the checkpoint "
            f"(auto_map), which is never run; known are {', '.join(sorted(SUPPORTED))}"
        )
    return f"the {family} family is not known here; known are {', '.join(sorted(SUPPORTED))}"


def special(family: str) -> Special:
    """Return how a family differs from the rest."""
    return SPECIAL.get(family, Special())


def context_of(config: PreTrainedConfig) -> int:
    """Return the longest text, in tokens, that a model is made for.

    Raises
    ------
    ValueError
        If its configuration names none, and neither does its family.
    """
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(config, name, None), int):
            return min(length, _switching_point(config) or length)
    if length := special(config.model_type).context:
        return length
    raise ValueError(f"a {config.model_type} configuration must name max_position_embeddings")


def _switching_point(config: PreTrainedConfig) -> int | None:
    """Return where positions are encoded otherwise, and what is in the cache no longer fits."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    point: int | None = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return point


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the family's own class of language models."""
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
