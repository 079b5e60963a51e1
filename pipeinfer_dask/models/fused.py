"""A decoder layer of Llama's shape in few operations: small runs are bound by their number.

What a family's own layer computes through a dozen modules and forty operations on small
tensors is written here as one function. It takes the place of a layer only where both give
the same for the weights at hand, which is tried out when a shard is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeinfer_dask.models.attention import attending, slot_attention
from pipeinfer_dask.models.cache import SlotCache
from pipeinfer_dask.models.linears import together
from pipeinfer_dask.models.splice import decoder_layers

LLAMA_SHAPED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Families whose layers compute what `FusedLayer` does, and have nothing to be set beyond it."""

TRIED_TOKENS = 3


class Rotary:
    """Positions as all layers of a pass need them: prepared by the first, for all."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, Tensor] | None = None
        self._prepared: tuple[Tensor, Tensor]

    def prepare(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Turn cosines and sines [1, n, head_dim] into factors [1, n, 1, head_dim]."""
        if given is not self._given:
            cos, sin = given
            near, far = sin.chunk(2, dim=-1)
            self._given = given
            self._prepared = cos[:, :, None], torch.cat((-near, far), dim=-1)[:, :, None]
        return self._prepared


class RootMeanSquare(nn.Module):
    """What an RMSNorm computes over the last dimension, in half as many operations."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        (size,) = norm.weight.shape
        # x / sqrt(mean(x**2) + eps) = x * sqrt(size) / hypot(norm(x), sqrt(size * eps))
        self._weight = norm.weight.detach() * size**0.5
        self._floor = torch.tensor((size * norm.variance_epsilon) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(length, self._floor)).mul_(self._weight)


class FusedLayer(nn.Module):
    """What a Llama-shaped decoder layer computes.

    Parameters
    ----------
    layer : nn.Module
        The family's own; its weights are shared.
    rotary : Rotary
        Shared by the layers of a model.

    Raises
    ------
    AttributeError
        If the layer is of another shape.
    """

    def __init__(self, layer: Any, rotary: Rotary) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.attention, self.mlp = attention, mlp
        self._rotary = rotary
        self._index: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._qkv = together([attention.q_proj, attention.k_proj, attention.v_proj])
        self._gate_up = together([mlp.gate_proj, mlp.up_proj])
        # Called without what modules do around it: they have no hooks.
        self._o, self._down = attention.o_proj.forward, mlp.down_proj.forward
        self._activation = mlp.act_fn.forward
        self._before = RootMeanSquare(layer.input_layernorm).forward
        self._after = RootMeanSquare(layer.post_attention_layernorm).forward
        self._q_norm, self._k_norm = (
            RootMeanSquare(getattr(attention, name)).forward if hasattr(attention, name) else None
            for name in ("q_norm", "k_norm")
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        **_: Any,
    ) -> Tensor:
        """Compute [1, n, hidden_size] from [1, n, hidden_size]."""
        cos, sin = self._rotary.prepare(position_embeddings)
        heads = (1, hidden_states.shape[1], -1, self._head_dim)
        half = self._head_dim // 2

        x = self._before(hidden_states)
        q, k, v = (product.view(heads) for product in self._qkv(x))
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(q), self._k_norm(k)
        q = torch.addcmul(q * cos, q.roll(half, -1), sin)
        k = torch.addcmul(k * cos, k.roll(half, -1), sin)
        keys, values = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self._index)
        attended, _weights = slot_attention(
            self.attention, q.transpose(1, 2), keys, values, attention_mask, self._scaling
        )
        hidden_states = hidden_states + self._o(attended.flatten(2))

        gate, up = self._gate_up(self._after(hidden_states))
        added: Tensor = self._down(self._activation(gate) * up)
        return hidden_states + added


def forward_pass(model: PreTrainedModel) -> Callable[..., Tensor]:
    """Return what computes the logits [1, picks, vocab_size] after the last tokens of a run.

    It is called with ``picks`` and what the model itself takes; on a stage without the head a hook
    ends the pass before. A Llama-shaped model is called without what transformers wraps around
    it: to record outputs, fill in defaults and pack results, for nobody here.
    """
    base: Any = model.base_model
    project: Any = model.get_output_embeddings()
    bare = inspect.unwrap(type(base).forward)
    shaped = model.config.model_type in LLAMA_SHAPED

    def forward(picks: int, **inputs: Any) -> Tensor:
        logits: Tensor
        if shaped:
            hidden = bare(base, use_cache=True, **inputs).last_hidden_state
            logits = project(hidden[:, hidden.shape[1] - picks :])
        else:
            logits = model(**inputs, logits_to_keep=picks).logits
        return logits

    return forward


def fuse(model: PreTrainedModel, layers: range) -> int:
    """Put fused layers in place of a loaded model's own where they compute the same.

    Parameters
    ----------
    model : PreTrainedModel
        Its layers have no hooks yet.
    layers : range
        Their numbers in the whole model.

    Returns
    -------
    int
        How many were replaced.
    """
    if model.config.model_type not in LLAMA_SHAPED:
        return 0
    owned = decoder_layers(model)[1]
    rotary, fused = Rotary(), 0
    with torch.inference_mode():
        for number, layer in zip(layers, list(owned), strict=True):
            try:
                candidate = FusedLayer(layer, rotary)
            except AttributeError:
                continue
            if _close(*(_tried(model, kind, number) for kind in (layer, candidate))):
                owned.add_module(str(number), candidate)
                fused += 1
        base: Any = model.base_model
        if hasattr(base.norm, "weight"):
            x = _random(model, 0)
            norm = RootMeanSquare(base.norm)
            if _close(base.norm(x), norm(x)):
                base.norm = norm
    return fused


def _close(family: Tensor, ours: Tensor) -> bool:
    return torch.allclose(ours, family, rtol=1e-4, atol=1e-5 * float(family.abs().max()))


def _random(model: PreTrainedModel, seed: int) -> Tensor:
    size: int = model.config.hidden_size
    return torch.randn(1, TRIED_TOKENS, size, generator=torch.Generator().manual_seed(seed))


def _tried(model: PreTrainedModel, layer: nn.Module, number: int) -> Tensor:
    """Compute a layer for tokens of which each attends to those before it."""
    base: Any = model.base_model
    hidden = _random(model, number)
    places = torch.arange(TRIED_TOKENS)
    store = SlotCache(range(number, number + 1), TRIED_TOKENS)
    store.turn_to(places, TRIED_TOKENS)
    before = torch.ones(TRIED_TOKENS, TRIED_TOKENS, dtype=torch.bool).tril()
    mask = torch.full((1, 1, TRIED_TOKENS, TRIED_TOKENS), -torch.inf).triu(1)
    with attending(before, places, places):
        output = layer(
            hidden,
            attention_mask=mask,
            position_ids=places[None],
            position_embeddings=base.rotary_emb(hidden, places[None]),
            past_key_values=store,
        )
    tried: Tensor = output[0] if isinstance(output, tuple) else output
    return tried
