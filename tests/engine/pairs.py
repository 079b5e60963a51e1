"""Tiny targets, and drafts of every quality made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import make_tiny

LAYERS = 4
NEW_TOKENS = 200
PROMPT = list(b"def main(arguments):")
SHARPNESS = 6.0
"""A random model is sure of nothing: its logits times this are as peaked as a trained one's."""


@dataclass(frozen=True)
class Pair:
    """A target of four layers, a draft of one, and the greedy text of the target after `PROMPT`."""

    target: Path
    draft: Path
    greedy: list[int]


PairOf = Callable[[str, str], Pair]
"""Gives the pair of a family and a quality."""


def make_pair(folder: Path, family: str, quality: str) -> Pair:
    """Make a target, and as its draft the target's first layer alone.

    How much the other layers say decides on how often the draft is right.
    """
    weight, sign = QUALITIES[quality]
    target = make_tiny(folder / "target", family, layers=LAYERS, seed=0)
    draft = make_tiny(folder / "draft", family, layers=1, seed=0)
    large, small = (AutoModelForCausalLM.from_pretrained(path) for path in (target, draft))
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            if "layers.0." not in name and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(weight)
        weights = large.state_dict()
        small.load_state_dict({name: weights[name] for name in small.state_dict()})
        small.get_output_embeddings().weight.mul_(sign * SHARPNESS)
    large.save_pretrained(target)
    small.save_pretrained(draft)
    return Pair(target, draft, greedy_tokens(target, PROMPT, NEW_TOKENS))


def greedy_tokens(path: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """Return what transformers itself generates."""
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def ending_at(path: Path, token: int) -> Path:
    """Have a model's texts end at a token."""
    config = AutoConfig.from_pretrained(path)
    config.eos_token_id = token
    config.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


QUALITIES = {
    # A negated head: the draft's first choice is what it holds least probable.
    "always wrong": (1.0, -1),
    "partly right": (0.2, 1),
    "always right": (0.0, 1),
}
"""What the target's other layers weigh, and the sign of the draft's logits."""
