"""Synthetic pairs of models, of any size, whose agreement is set by a dial.

The target is a random Llama, and the draft its first layer under the same embedding and
head. How much the target's other layers have to say decides how often the two agree. The
text means nothing, but it costs what real text costs, and it neither ends nor runs into a
loop: keys and queries are large, so that attention picks a few tokens out of the whole text
and what comes next depends on all of it.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

__all__ = ["ModelPair", "make_pair"]

END_OF_TEXT = "<|endoftext|>"
"""The last token of the vocabulary."""
VOCABULARY = 4096
HEAD = 64
"""Width of an attention head; a model has as many layers as its hidden states have such widths."""
SELECTIVE = 2.0
"""Scale of keys and queries."""
PRESENT = 4.0
"""Scale of what attention writes, relative to the token itself and to the MLP."""
SHARP = 8.0
"""Standard deviation of the target's logits: about as sure of itself as a trained model."""
TEXTS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 32
"""What the agreement is measured on."""
STEPS = 12
"""Most scales to try."""
NEAR, FAR = 0.02, 0.06
"""How near to the dial is good enough, and how far from it, after all steps, is too far."""


class ModelPair(NamedTuple):
    """A target and its draft.

    Attributes
    ----------
    target, draft : Path
        Directories in Hugging Face format, each with a tokenizer.
    agreement : float
        How often the draft's first choice was the target's, measured along greedy text.
    """

    target: Path
    draft: Path
    agreement: float


def make_pair(
    directory: str | os.PathLike[str],
    *,
    parameters: int = 200_000_000,
    agreement: float = 0.8,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> ModelPair:
    """Make a target and a draft, and save them as ``target`` and ``draft`` in a directory.

    Takes about a minute on two cores for a target of 200 million parameters: the agreement is
    measured for one scale after the other.

    Parameters
    ----------
    directory : str or path
        Made when it is not there.
    parameters : int
        About how many the target is to have; the nearest size is taken. From 200,000.
    agreement : float
        The share of tokens, between 0.05 and 0.95, for which the draft's first choice is to be
        the target's. The draft's confidences are as high on average.
    seed : int
        Of the weights.
    dtype : torch.dtype
        What the weights are stored in.

    Returns
    -------
    ModelPair
        ``(target, draft, agreement)``, with the agreement that was measured.

    Raises
    ------
    ValueError
        If parameters or agreement are out of range.
    RuntimeError
        If no scale gives that agreement: another seed may.
    """
    if not 0.05 <= agreement <= 0.95:
        raise ValueError(f"expected an agreement between 0.05 and 0.95, got {agreement}")
    if parameters < 200_000:
        raise ValueError(f"expected at least 200000 parameters, got {parameters}: ask for more")
    logging.disable_progress_bar()  # nobody waits for files of this size
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        target, draft = _random_pair(_config(parameters), dtype)
        prompts = torch.randint(0, VOCABULARY, (TEXTS, PROMPT_TOKENS))
        reached = _set_agreement(target, draft, prompts, agreement, dtype)
    pair = ModelPair(Path(directory) / "target", Path(directory) / "draft", reached)
    model: Any
    for model, folder in ((target, pair.target), (draft, pair.draft)):
        model.to(dtype).save_pretrained(folder)
        byte_tokenizer(VOCABULARY).save_pretrained(folder)
    return pair


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that gives each byte of a text a token, of a vocabulary from 257 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"<{i}>" for i in range(len(alphabet), vocab_size - 1)] + [END_OF_TEXT]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def _config(parameters: int) -> LlamaConfig:
    """Return the configuration whose number of parameters is nearest."""

    def shape(heads: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=heads * HEAD,
            intermediate_size=heads * HEAD * 11 // 4,
            num_hidden_layers=max(2, heads),
            num_attention_heads=heads,
            num_key_value_heads=math.gcd(heads, max(1, heads // 2)),
            head_dim=HEAD,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,  # no text ends by itself
            pad_token_id=None,
        )

    def count(config: LlamaConfig) -> int:
        width = config.hidden_size
        keys = HEAD * (config.num_key_value_heads or config.num_attention_heads)
        layer = 2 * width * (width + keys) + 3 * width * config.intermediate_size
        return config.num_hidden_layers * layer + 2 * VOCABULARY * width

    return min(map(shape, range(1, 65)), key=lambda config: abs(count(config) - parameters))


def _random_pair(
    config: LlamaConfig, dtype: torch.dtype
) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    target = LlamaForCausalLM(config).eval()
    for name, parameter in target.named_parameters():
        if parameter.dim() < 2:
            continue  # norms stay at one
        scale = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
        if "q_proj" in name or "k_proj" in name:
            scale *= SELECTIVE
        elif "o_proj" in name:
            scale *= PRESENT
        elif "lm_head" in name:
            scale *= SHARP
        elif "embed" in name:
            scale /= 2
        parameter.copy_(parameter.normal_(std=scale).to(dtype))
    small = LlamaConfig(**config.to_dict() | {"num_hidden_layers": 1})
    draft = LlamaForCausalLM(small).eval()
    weights = target.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    return target, draft


def _set_agreement(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    prompts: Tensor,
    wanted: float,
    dtype: torch.dtype,
) -> float:
    """Scale what the target's later layers write until the two agree as wanted; how they do."""
    deep: list[Tensor] = []
    for layer in target.model.layers[1:]:
        deep += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    whole = [weight.clone() for weight in deep]
    low, high = 1e-3, 1.0  # the larger the scale, the less they agree
    reached, logits = -1.0, torch.empty(0)
    for _ in range(STEPS):
        scale = math.sqrt(low * high)
        for weight, original in zip(deep, whole, strict=True):
            weight.copy_((scale * original).to(dtype))
        reached, logits = _agreement(target, draft, prompts)
        if abs(reached - wanted) <= NEAR:
            break
        low, high = (scale, high) if reached > wanted else (low, scale)
    if abs(reached - wanted) > FAR:
        raise RuntimeError(
            f"expected an agreement of {wanted}, got {reached:.2f}: try another seed or size"
        )
    # A model's confidences are about as high as it's right: so the draft's are made.
    draft.model.norm.weight.mul_(_temper(logits, reached))
    return reached


def _agreement(target: Any, draft: Any, prompts: Tensor) -> tuple[float, Tensor]:
    """Return how often the two agree along the target's text, and the draft's logits there."""
    text = target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )
    logits: Tensor = draft(text).logits[:, PROMPT_TOKENS - 1 : -1].flatten(0, 1)
    greedy = text[:, PROMPT_TOKENS:].flatten()
    return float((logits.argmax(-1) == greedy).float().mean()), logits


def _temper(logits: Tensor, confidence: float) -> float:
    """Return the factor of logits that gives the first choice this probability on average."""
    low, high = 1e-3, 1e3
    for _ in range(30):
        factor = math.sqrt(low * high)
        sure = float(torch.softmax(factor * logits, -1).amax(-1).mean()) > confidence
        low, high = (low, factor) if sure else (factor, high)
    return factor
