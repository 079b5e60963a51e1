"""Decoder layers of many families in few operations: small runs are bound by their number.

What a family's own layer computes through a dozen modules and forty operations on small
tensors is written here as one function, told by a table how the family's layers are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeinfer_dask.models.attention import packed_attention
from pipeinfer_dask.models.cache import SlotCache
from pipeinfer_dask.models.linears import together
from pipeinfer_dask.models.norms import Function, bare_norm
from pipeinfer_dask.models.rotary import Rotary, Turns


@dataclass(frozen=True, slots=True)
class Shape:
    """How a family's decoder layers are made: what their parts are called, and their order.

    Attributes
    ----------
    attention : str
    projections : tuple of str
        Of the attention's queries, keys and values; one name where they are one matrix.
    mixed : bool
        Whether the rows of the one matrix are in the order of the heads.
    output : str
        What the attended values go through.
    expanding : tuple of str
        Of the feed-forward part: the gate and what it gates, or one matrix for both.
    gated : bool
        Whether there is a gate.
    contracting : str
    activation : str
    before, after : tuple of (str or None), [2]
        Norms before and after attention and feed-forward part.
    parallel : bool
        Whether both parts take what comes in. So it is, too, in a layer that says so itself.
    capped : bool
        Whether scores of attention are bounded.
    interleaved : bool
        Whether rotary positions pair neighbours.
    once : bool
        Whether their factors are given once for both of a pair.
    places : str, optional
        The embedding of positions, where they are added to the tokens'.
    final : str
        The norm after all layers.
    """

    attention: str = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    mixed: bool = False
    output: str = "o_proj"
    expanding: tuple[str, ...] = ("gate_proj", "up_proj")
    gated: bool = True
    contracting: str = "down_proj"
    activation: str = "act_fn"
    before: tuple[str | None, str | None] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str | None, str | None] = (None, None)
    parallel: bool = False
    capped: bool = False
    interleaved: bool = False
    once: bool = False
    places: str | None = None
    final: str = "norm"


LLAMA = Shape()
GPT2 = Shape(
    attention="attn",
    projections=("c_attn",),
    output="c_proj",
    expanding=("c_fc",),
    gated=False,
    contracting="c_proj",
    activation="act",
    before=("ln_1", "ln_2"),
    places="wpe",
    final="ln_f",
)
GEMMA = Shape(
    before=("input_layernorm", "pre_feedforward_layernorm"),
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
)
SHAPES = {
    "cohere": Shape(before=("input_layernorm", None), parallel=True, interleaved=True),
    "gemma": LLAMA,
    "gemma2": replace(GEMMA, capped=True),
    "gemma3_text": GEMMA,
    "glm4": Shape(
        expanding=("gate_up_proj",),
        activation="activation_fn",
        after=("post_self_attn_layernorm", "post_mlp_layernorm"),
        interleaved=True,
    ),
    "gpt_oss": Shape(once=True),
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": Shape(
        attention="attention",
        projections=("query_key_value",),
        mixed=True,
        output="dense",
        expanding=("dense_h_to_4h",),
        gated=False,
        contracting="dense_4h_to_h",
        activation="act",
        final="final_layer_norm",
    ),
    "granite": LLAMA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "olmo2": Shape(
        before=(None, None), after=("post_attention_layernorm", "post_feedforward_layernorm")
    ),
    "phi": Shape(
        output="dense",
        expanding=("fc1",),
        gated=False,
        contracting="fc2",
        activation="activation_fn",
        before=("input_layernorm", None),
        parallel=True,
        final="final_layernorm",
    ),
    "phi3": Shape(
        projections=("qkv_proj",), expanding=("gate_up_proj",), activation="activation_fn"
    ),
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": Shape(expanding=("c_fc",), gated=False, contracting="c_proj", activation="act"),
}
"""The families whose layers `FusedLayer` can compute. They have nothing to be set beyond it."""


class FusedLayer:
    """What a decoder layer computes.

    Parameters
    ----------
    layer : nn.Module
        The family's own; its weights are shared.
    shape : Shape
    config : PreTrainedConfig
    rotary : Rotary, optional
        Without it positions are not the layers' concern.

    Attributes
    ----------
    groups : int
        Query heads that share a key.

    Raises
    ------
    AttributeError
        If the layer is of another shape.
    """

    def __init__(self, layer: Any, shape: Shape, config: Any, rotary: Rotary | None) -> None:
        attention = getattr(layer, shape.attention)
        self._index: int = attention.layer_idx
        self._head_dim: int = getattr(attention, "head_dim", None) or attention.head_size
        self._scaling: float = attention.scaling
        self._softcap: float | None = attention.attn_logit_softcapping if shape.capped else None
        self._sinks: Tensor | None = getattr(attention, "sinks", None)
        self._turn = rotary.turn if rotary and getattr(attention, "use_rope", True) else None
        linears = [getattr(attention, name) for name in shape.projections]
        heads: int = config.num_attention_heads
        nothing = torch.zeros(1, config.hidden_size, dtype=torch.float32)
        rows = sum(linear(nothing).shape[-1] for linear in linears) // self._head_dim
        self._key_heads = (rows - heads) // 2
        self.groups = heads // self._key_heads
        self._project = (
            _mixed(linears[0], heads)
            if shape.mixed
            else _joint(
                linears, [self._head_dim * n for n in (heads, self._key_heads, self._key_heads)]
            )
        )
        # Called without what modules do around it: they have no hooks.
        self._output: Function = getattr(attention, shape.output).forward
        norms = [
            norm
            for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
            if (norm := getattr(attention, name, None)) is not None
        ]
        self._head_norms = [bare_norm(norm) for norm in norms]
        self._of_all_heads = any(
            norm.weight.dim() == 1 and len(norm.weight) != self._head_dim
            for norm in norms
            if hasattr(norm, "weight")
        )
        self._before, self._between = (_named_norm(layer, name) for name in shape.before)
        self._after, self._last = (_named_norm(layer, name) for name in shape.after)
        self._parallel: bool = getattr(layer, "use_parallel_residual", shape.parallel)
        self._residual: float = getattr(layer, "residual_multiplier", 1.0)
        self._feed_forward = _feed_forward(layer.mlp, shape)

    def __call__(self, x: Tensor, mask: Tensor, turns: Turns | None, cache: SlotCache) -> Tensor:
        """Compute [n, hidden_size] from [n, hidden_size].

        The mask is [1, 1, groups * n, filled], the first heads of all groups before the second.
        """
        given = self._before(x) if self._before else x
        added = self._attend(given, mask, turns, cache)
        if self._after:
            added = self._after(added)
        attended = torch.add(x, added, alpha=self._residual)
        if self._parallel:
            given = self._between(x) if self._between else given
        else:
            given = self._between(attended) if self._between else attended
        added = self._feed_forward(given)
        if self._last:
            added = self._last(added)
        return torch.add(attended, added, alpha=self._residual)

    def _attend(self, x: Tensor, mask: Tensor, turns: Turns | None, cache: SlotCache) -> Tensor:
        n, dim = x.shape[0], self._head_dim
        q, k, v = self._project(x)
        if self._of_all_heads:
            q, k = (norm(part) for norm, part in zip(self._head_norms, (q, k), strict=True))
        q, k, v = q.reshape(n, -1, dim), k.reshape(n, -1, dim), v.reshape(n, -1, dim)
        if self._head_norms and not self._of_all_heads:
            q, k = (norm(part) for norm, part in zip(self._head_norms, (q, k), strict=True))
        if self._turn and turns:
            q, k = self._turn(q, turns), self._turn(k, turns)
        keys, values = cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], self._index)
        attended = packed_attention(
            q.transpose(0, 1).reshape(1, self._key_heads, -1, dim),
            keys,
            values,
            mask,
            self._scaling,
            self._softcap,
            self._sinks,
        )
        return self._output(attended.reshape(-1, n, dim).transpose(0, 1).reshape(n, -1))


def _named_norm(layer: nn.Module, name: str | None) -> Function | None:
    norm = None if name is None else getattr(layer, name)
    return None if norm is None else bare_norm(norm)


def _joint(linears: Sequence[nn.Module], sizes: Sequence[int]) -> Callable[[Tensor], Any]:
    """Return what computes products of these sizes, by a matrix for each or by one for all."""
    if len(linears) > 1:
        return together(linears)
    (linear,) = linears
    forward: Function = linear.forward
    return lambda x: forward(x).split(sizes, dim=-1)


def _mixed(linear: nn.Module, heads: int) -> Callable[[Tensor], Any]:
    """Return what computes products that have a head's query, key and value side by side."""
    forward: Function = linear.forward
    return lambda x: forward(x).view(x.shape[0], heads, -1).chunk(3, dim=-1)


def _feed_forward(mlp: Any, shape: Shape) -> Function:
    if hasattr(mlp, "experts"):

        def by_family(x: Tensor) -> Tensor:
            output = mlp(x[None])
            # Some tell what their routers said, too.
            result: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
            return result

        return by_family
    matrices = [getattr(mlp, name) for name in shape.expanding]
    activate: Function = getattr(mlp, shape.activation).forward
    contract: Function = getattr(mlp, shape.contracting).forward
    if not shape.gated:
        (expand,) = (matrix.forward for matrix in matrices)
        return lambda x: contract(activate(expand(x)))
    size: int = getattr(mlp, shape.contracting).in_features
    expand = _joint(matrices, (size, size))

    def gated(x: Tensor) -> Tensor:
        gate, up = expand(x)
        return contract(activate(gate).mul_(up))

    return gated
