"""A tiny configuration for each family, with what makes it special; see `tests.tiny.make_tiny`."""

from __future__ import annotations

from typing import Any

WINDOW = 8
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-head-per-key": ("llama", {"num_key_value_heads": 4}),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3-sliding": ("phi3", {"sliding_window": WINDOW}),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "falcon-multi-query": ("falcon", {}),
    "falcon-new-decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-projected": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {"max_seq_len": 512}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, **EXPERTS}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 3.0,
            "attention_multiplier": 0.3,
        },
    ),
    "smollm3": ("smollm3", {}),
    "gpt_oss": ("gpt_oss", {"sliding_window": WINDOW, "num_local_experts": 4, **EXPERTS}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "starcoder2-sliding": ("starcoder2", {"sliding_window": WINDOW}),
    "glm4": ("glm4", {}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 5,
            "head_dim": 4,
            **EXPERTS,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 40,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 1, 0, 1],
            "floor_scale": 4,
            "attn_scale": 0.5,
        },
    ),
}
"""The name of a variant, its family, and the fields of its configuration beyond the tiny ones."""
