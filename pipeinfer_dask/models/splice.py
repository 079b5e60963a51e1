"""How a stage's share is cut out of a family's own model, without a line of the family's code.

The model is made whole, without memory (on torch's meta device), and what the stage does
not own is taken out. Layers keep their absolute names and numbers, so no weight is renamed.
The family's own `forward` then runs over what is left; hooks on the owned layers put in
what the stage before sent, take out what the next one needs, and look before each layer
whether anybody still wants the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeinfer_dask.models.attention import attending
from pipeinfer_dask.models.cache import SlotCache
from pipeinfer_dask.models.families import special
from pipeinfer_dask.models.inputs import Inputs

HIDDEN_DIM = 3
"""Hidden states are [batch, tokens, features]; token ids, positions and masks have fewer sides."""


class OwnedLayers(nn.ModuleList):
    """Some of a model's layers, under their numbers in the whole model."""

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        for number, layer in layers.items():
            self.add_module(str(number), layer)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self._modules.values())[index]


def spliced(
    family: type[PreTrainedModel],
    owned: range,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
) -> type[PreTrainedModel]:
    """Make a class of the family's models that have only the owned layers.

    The first stage also keeps what comes before the layers, and the last one what comes
    after them. A model is shown to ``prepare`` when it is cut, before weights are loaded.
    """

    def init(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        special(config.model_type).prepare()
        family.__init__(self, config, *args, **kwargs)
        _trim(self, owned)
        for layer in decoder_layers(self)[1]:
            special(config.model_type).adapt(layer)
        prepare(self)

    body = {
        "__init__": init,
        "__module__": family.__module__,
        # The other stages' tensors are in the checkpoint, and that is as it should be.
        "_keys_to_ignore_on_load_unexpected": [".*"],
    }
    return type(family.__name__, (family,), body)


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers in a model, and its full name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            return name, module
    raise ValueError(f"{type(model).__name__} has no list of decoder layers to split")


def _trim(model: PreTrainedModel, owned: range) -> None:
    path, layers = decoder_layers(model)
    *wrappers, layers_name = path.split(".")
    is_last = owned.stop == len(layers)
    # A tied head is the embedding, so the last stage keeps it too.
    tied = model.get_input_embeddings() if is_last and model.all_tied_weights_keys else None
    parent: nn.Module = model
    for name in wrappers:
        if not is_last:
            _remove(parent, [other for other, _ in parent.named_children() if other != name])
        parent = getattr(parent, name)
    before, after = _around(model.config.model_type, parent, layers_name)
    if owned.start > 0:
        _remove(parent, before, keep=tied)
    if not is_last:
        _remove(parent, after)
        model.all_tied_weights_keys = {}
    held = list(layers)
    setattr(parent, layers_name, OwnedLayers({number: held[number] for number in owned}))
    config: Any = parent.config
    if hasattr(config, "layer_types"):
        # Some families look a layer's type up by its place in the list, which is shorter now.
        config = copy(config)
        config.layer_types = config.layer_types[owned.start : owned.stop]
        parent.config = config


def _around(family: str, decoder: nn.Module, layers_name: str) -> tuple[list[str], list[str]]:
    """Name what comes before the layers and what comes after them: as a rule it stands there."""
    children = [name for name, _ in decoder.named_children()]
    middle = children.index(layers_name)
    before = [name for name in children[:middle] if name not in special(family).after]
    return before, [name for name in children if name not in before and name != layers_name]


def _remove(parent: nn.Module, names: Sequence[str], keep: nn.Module | None = None) -> None:
    for name in names:
        child = getattr(parent, name)
        # What has no weights of its own, such as rotary positions, every stage needs.
        if child is not keep and any(True for _ in child.parameters()):
            setattr(parent, name, Absent())


class Absent(nn.Module):
    """Stands where a part of the model is another stage's: changes nothing."""

    def forward(self, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Hidden states pass; what was to be added to them, for tokens or positions, is nothing.
        return given if given.dim() == HIDDEN_DIM else torch.zeros(())


class Departure(Exception):  # noqa: N818 - it is no error: it ends a forward pass early
    """Carries the hidden states, [1, n, hidden_size], out of a model; None where it was stopped."""

    def __init__(self, hidden: Tensor | None) -> None:
        super().__init__()
        self.hidden = hidden


class SplicedPass:
    """Passes of a model through its family's own forward, with hooks on the layers.

    Parameters
    ----------
    model : PreTrainedModel
    first, last : bool
        Whether it has what comes before all layers, and after them.

    Attributes
    ----------
    computed : int
        Layers computed in the last pass.
    """

    def __init__(self, model: PreTrainedModel, *, first: bool, last: bool) -> None:
        self.computed = 0
        self._model: Any = model
        self._first = first
        self._last = last
        self._hidden: Tensor | None = None
        self._picks = 0
        self._stopped: Callable[[], bool] = bool
        layers = decoder_layers(model)[1]
        for layer in layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave)

    def __call__(
        self, inputs: Inputs[Tensor], cache: SlotCache, picks: int, stopped: Callable[[], bool]
    ) -> Tensor | None:
        """Compute a pass of n tokens over the slots that a cache was turned to.

        Returns
        -------
        Tensor or None
            Hidden states [n, hidden_size]; with the head, logits [picks, vocab_size] after the
            last tokens. None if it was stopped.
        """
        received = inputs.given[None]
        self._hidden, self._picks, self._stopped = received, picks, stopped
        self.computed = -1
        name = "input_ids" if self._first else "inputs_embeds"
        try:
            with attending(inputs.allowed, inputs.positions, inputs.held):
                output = self._model(
                    **{name: received},
                    position_ids=inputs.positions[None],
                    past_key_values=cache,
                    logits_to_keep=picks,
                )
        except Departure as departure:
            return None if departure.hidden is None else departure.hidden[0]
        logits: Tensor = output.logits[0]
        return logits

    def _enter(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.computed += 1
        if self._stopped():
            raise Departure(None)
        if self.computed > 0 or self._first:
            return None
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._hidden}

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.computed += 1
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if not self._last:
            raise Departure(hidden)
        if self._stopped():
            raise Departure(None)
        if self._picks == 0:
            raise Departure(hidden[:, :0])
        return output
