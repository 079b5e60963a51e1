"""A pass through fused layers, with nothing between them but what has to be computed.

What a family's own forward does around its layers (which mask and which rotary positions each
of them gets) is not written down here: it is watched once, when a shard is loaded. Then what
every layer, the embedding and the head computed is compared with what is computed here, and only
a model that says the same throughout goes this way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeinfer_dask.models.attention import MaskFunction, additive, attending
from pipeinfer_dask.models.cache import SlotCache
from pipeinfer_dask.models.families import context_of
from pipeinfer_dask.models.fused import SHAPES, FusedLayer, Shape
from pipeinfer_dask.models.inputs import Inputs
from pipeinfer_dask.models.norms import Function, bare_norm, close
from pipeinfer_dask.models.rotary import Rotary, Turns
from pipeinfer_dask.models.splice import decoder_layers

TRIED = 3
"""Tokens of the watched pass, each of which attends to those before it."""


def fused_pass(model: PreTrainedModel, layers: range) -> FusedPass | None:
    """Return what computes a loaded model's passes in few operations, where it can be done.

    Parameters
    ----------
    model : PreTrainedModel
        On the CPU, in float32; its layers have no hooks yet.
    layers : range
        Their numbers in the whole model.

    Returns
    -------
    FusedPass or None
        None for a family without an entry in `SHAPES`, or a model that computes something else
        than the entry says.
    """
    shape = SHAPES.get(model.config.model_type)
    if shape is None:
        return None
    with torch.inference_mode():
        watched = _watch(model, layers)
        try:
            found = FusedPass(model, layers, shape, watched)
        except AttributeError:
            return None
        return found if found.agrees(watched) else None


@dataclass
class Watched:
    """What the parts of a model were given in one pass, and what they made of it.

    Attributes
    ----------
    inputs : Inputs
    given, made : list of Tensor, [layers], each [n, hidden_size]
    masks : list of callable, [layers]
        The family's functions by which the layers' masks were made.
    rotary : list of (tuple or None), [layers]
        What the family's rotary positions were called with beside hidden states and positions;
        None for a layer that was given none.
    logits : Tensor, [n, vocab_size]
        Of the last stage.
    """

    inputs: Inputs[Tensor]
    given: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    masks: list[MaskFunction] = field(default_factory=list)
    rotary: list[tuple[Any, ...] | None] = field(default_factory=list)
    logits: Tensor | None = None


class FusedPass:
    """Passes of a model whose layers are all fused.

    Parameters
    ----------
    model : PreTrainedModel
    layers : range
    shape : Shape
    watched : Watched

    Attributes
    ----------
    computed : int
        Layers computed in the last pass.

    Raises
    ------
    AttributeError
        If the model is of another shape.
    """

    def __init__(
        self, model: PreTrainedModel, layers: range, shape: Shape, watched: Watched
    ) -> None:
        self.computed = 0
        self._range = layers
        config: Any = model.config
        base: Any = model.base_model
        self._embed = _embedding(model, shape.places) if layers.start == 0 else None
        is_last = layers.stop == config.num_hidden_layers
        self._head = _head(model, bare_norm(getattr(base, shape.final))) if is_last else None
        self._masks = list(dict.fromkeys(watched.masks))
        kinds = list(dict.fromkeys(watched.rotary))
        context = context_of(config)
        self._rotary = [
            None
            if kind is None
            else Rotary(
                base.rotary_emb, kind, context, interleaved=shape.interleaved, once=shape.once
            )
            for kind in kinds
        ]
        self._layers = [
            (
                FusedLayer(layer, shape, config, self._rotary[kinds.index(kind)]),
                self._masks.index(mask),
                kinds.index(kind),
            )
            for layer, mask, kind in zip(
                decoder_layers(model)[1], watched.masks, watched.rotary, strict=True
            )
        ]
        self._groups = self._layers[0][0].groups

    def __call__(
        self, inputs: Inputs[Tensor], cache: SlotCache, picks: int, stopped: Callable[[], bool]
    ) -> Tensor | None:
        """Compute a pass; see `SplicedPass`."""
        self.computed = 0
        hidden = inputs.given if self._embed is None else self._embed(inputs)
        masks, turns = self._prepared(inputs)
        for layer, mask, rotary in self._layers:
            if stopped():
                return None
            hidden = layer(hidden, masks[mask], turns[rotary], cache)
            self.computed += 1
        if self._head is None:
            return hidden
        if stopped():
            return None
        ends = hidden[hidden.shape[0] - picks :]
        return self._head(ends) if picks else ends

    def _prepared(self, inputs: Inputs[Tensor]) -> tuple[list[Tensor], list[Turns | None]]:
        """Return what the layers share: masks [1, 1, groups * n, filled], rotary positions."""
        masks = []
        for function in self._masks:
            mask = additive(inputs.allowed, inputs.positions, inputs.held, function)
            masks.append((mask if mask.shape[0] == 1 else mask.repeat(self._groups, 1))[None, None])
        return masks, [rotary.at(inputs.positions) if rotary else None for rotary in self._rotary]

    def agrees(self, watched: Watched) -> bool:
        """Say whether every part computes what the family's own did."""
        inputs = watched.inputs
        cache = SlotCache(self._range, len(inputs.slots))
        cache.turn_to(inputs.slots, len(inputs.slots))
        masks, turns = self._prepared(inputs)
        pairs = [
            (made, layer(given, masks[mask], turns[rotary], cache))
            for (layer, mask, rotary), given, made in zip(
                self._layers, watched.given, watched.made, strict=True
            )
        ]
        if self._embed is not None:
            pairs.append((watched.given[0], self._embed(inputs)))
        if self._head is not None and watched.logits is not None:
            pairs.append((watched.logits, self._head(watched.made[-1])))
        return all(close(family, ours) for family, ours in pairs)


def _embedding(model: PreTrainedModel, places: str | None) -> Callable[[Inputs[Tensor]], Tensor]:
    look_up: Function = model.get_input_embeddings().forward
    if places is not None:
        position: Function = getattr(model.base_model, places).forward
        return lambda inputs: look_up(inputs.given) + position(inputs.positions)
    factor: float = getattr(model.base_model, "embedding_multiplier", 1.0)
    if factor == 1:
        return lambda inputs: look_up(inputs.given)
    return lambda inputs: look_up(inputs.given).mul_(factor)


def _head(model: PreTrainedModel, norm: Function) -> Function:
    """Return what computes logits [n, vocab_size] from hidden states [n, hidden_size]."""
    config: Any = model.config
    project: Function = model.get_output_embeddings().forward
    factor: float = getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)
    bound: float | None = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = project(norm(hidden))
        if factor != 1:
            logits.mul_(factor)
        return logits if bound is None else torch.tanh(logits / bound).mul_(bound)

    return head


def _watch(model: PreTrainedModel, layers: range) -> Watched:
    """Have the family's own forward compute a pass."""
    family: Any = model
    config: Any = model.config
    places = torch.arange(TRIED)
    before = torch.ones(TRIED, TRIED, dtype=torch.bool).tril()
    hidden = torch.randn(
        TRIED,
        config.hidden_size,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
    )
    is_first = layers.start == 0
    watched = Watched(Inputs(places if is_first else hidden, places, places, before, places))
    encoded: dict[int, tuple[Any, ...]] = {}
    taken: list[tuple[Any, ...]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append((*args, *kwargs.values()))
        watched.given.append((args[0] if args else kwargs["hidden_states"])[0])

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watched.made.append((output[0] if isinstance(output, tuple) else output)[0])

    def encode(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        encoded[id(output)] = (*args, *kwargs.values())[2:]

    hooks = [
        module.register_forward_hook(encode, with_kwargs=True)
        for name, module in family.base_model.named_children()
        if name == "rotary_emb"
    ]
    for layer in decoder_layers(model)[1]:
        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(layer.register_forward_hook(leave))
    cache = SlotCache(layers, TRIED)
    cache.turn_to(places, TRIED)
    name = "input_ids" if is_first else "inputs_embeds"
    try:
        with attending(before, places, places) as told:
            output = family(
                **{name: watched.inputs.given[None]},
                position_ids=places[None],
                past_key_values=cache,
            )
    finally:
        for hook in hooks:
            hook.remove()
    for values in taken:
        # By identity, whatever a family calls its arguments.
        ids = [id(value) for value in values]
        watched.masks.append(next(told.functions[key] for key in ids if key in told.functions))
        watched.rotary.append(next((encoded[key] for key in ids if key in encoded), None))
    watched.logits = output.logits[0]
    return watched
