"""What a few families need beyond the rest: attention that looks up no function, biases by place.

Nothing is copied from the families: their own modules are registered, or hooked, so that
they are told slots and positions where they would count tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import sliding_window_causal_mask_function

from pipeinfer_dask.models.attention import (
    SLOT_ATTENTION,
    slot_attention,
    slot_mask,
    slot_positions,
    token_positions,
)


@dataclass(frozen=True, slots=True)
class Special:
    """How one family differs from the rest.

    Attributes
    ----------
    prepare : callable
        Called before a model is made.
    adapt : callable
        Called with each decoder layer of a model.
    after : frozenset of str
        Modules that stand before the layers, but are applied after them.
    context : int, optional
        The longest text where the configuration names none.
    """

    prepare: Callable[[], None] = lambda: None
    adapt: Callable[[nn.Module], None] = lambda layer: None
    after: frozenset[str] = frozenset()
    context: int | None = None


def by_slot(bias: Tensor) -> Tensor:
    """Turn a bias of keys in the order of a text, [..., keys], into one of slots, [..., filled].

    As many keys as slots are filled end the bias: families make it longer, or just as long.
    """
    places = slot_positions()
    # What is not attended to may lie anywhere.
    keys = (places + bias.shape[-1] - len(places)).clamp_(0, bias.shape[-1] - 1)
    return bias[..., keys]


def alibi_by_slot(name: str) -> Callable[[nn.Module], None]:
    """Have layers take their linear bias, an argument of this name, by slot."""

    def enter(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {name: by_slot(kwargs[name])}

    def adapt(layer: nn.Module) -> None:
        layer.register_forward_pre_hook(enter, with_kwargs=True)

    return adapt


def register_gptj() -> None:
    """GPT-J's attention takes any mask as it is."""
    from transformers.models.gptj import modeling_gptj as gptj

    gptj.GPTJ_ATTENTION_CLASSES[SLOT_ATTENTION] = gptj.GPTJAttention


def register_gpt_neo() -> None:
    """GPT-Neo's local layers tell their windows by place in the cache: here by position."""
    from transformers.models.gpt_neo import modeling_gpt_neo as gpt_neo

    class Attention(gpt_neo.GPTNeoSelfAttention):
        def _attn(
            self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
        ) -> tuple[Tensor, None]:
            if self.attention_type == "local":
                window = sliding_window_causal_mask_function(self.config.window_size)
                attention_mask = slot_mask(mask_function=window, dtype=query.dtype)
            attended, _ = slot_attention(self, query, key, value, attention_mask, scaling=1.0)
            return attended.transpose(1, 2), None

    gpt_neo.GPT_NEO_ATTENTION_CLASSES[SLOT_ATTENTION] = Attention


def register_falcon() -> None:
    """Falcon's attention repeats shared keys before it keeps them: here they stay packed."""
    from transformers.models.falcon import modeling_falcon as falcon

    class Attention(falcon.FalconAttention):
        def forward(  # type: ignore[override]
            self,
            hidden_states: Tensor,
            alibi: Tensor | None,
            attention_mask: Tensor,
            position_embeddings: tuple[Tensor, Tensor],
            layer_past: Any,
            **_: Any,
        ) -> tuple[Tensor, None]:
            n = hidden_states.shape[1]
            fused = self.query_key_value(hidden_states)
            if self.new_decoder_architecture or not self.multi_query:
                fused = fused.view(n, self.num_kv_heads, -1, self.head_dim)
            else:
                fused = fused.view(n, 1, -1, self.head_dim)
            query, key, value = fused.split([fused.shape[2] - 2, 1, 1], dim=2)
            query, key, value = (x.flatten(1, 2).transpose(0, 1)[None] for x in (query, key, value))
            if alibi is None:
                query, key = falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
            else:
                unattended = attention_mask <= torch.finfo(attention_mask.dtype).min
                bias = by_slot(alibi) / math.sqrt(self.head_dim)
                attention_mask = bias.masked_fill(unattended, -torch.inf)
            key, value = layer_past.update(key, value, self.layer_idx)
            attended = slot_attention(self, query, key, value, attention_mask)[0]
            return self.dense(attended.flatten(2)), None

    falcon.FALCON_ATTENTION_CLASSES[SLOT_ATTENTION] = Attention


def tell_positions(layer: nn.Module) -> None:
    """Have Llama 4's layers without rotary positions scale their queries by position."""
    attention: Any = layer.self_attn

    class Told:
        """A cache before which the tokens at hand seem to lie, each at its own distance."""

        def __init__(self, cache: Any) -> None:
            self.update = cache.update

        def get_seq_length(self, layer_idx: int) -> Tensor:
            positions = token_positions()
            return positions - torch.arange(len(positions), device=positions.device)

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"past_key_values": Told(kwargs["past_key_values"])}

    if attention.attn_temperature_tuning and not attention.use_rope:
        attention.register_forward_pre_hook(enter, with_kwargs=True)
