"""Whether a checkpoint's tensors make a model: the loading, rehearsed with shapes alone.

A checkpoint's names need not be the model's: transformers adds and takes prefixes, renames,
and fuses tensors, such as those of a layer's experts. Its own rules are applied here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from pipeinfer_dask.models.quiet import without_progress_bars
from pipeinfer_dask.models.tensors import StoredTensor

META = torch.device("meta")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What came of it.

    Attributes
    ----------
    missing : list of str
        Tensors of the model that the checkpoint does not give.
    misfits : list of (str, tuple of int, tuple of int)
        Tensors of the model with the shape that the checkpoint gives, and their own.
    errors : dict of str to str
        Tensors of the model that can't be made of the checkpoint's, and why.
    used : list of StoredTensor
        What the model takes from the checkpoint.
    """

    missing: list[str]
    misfits: list[tuple[str, Shape, Shape]]
    errors: dict[str, str]
    used: list[StoredTensor]


class _Shadow:
    """A stored tensor's shape, to be converted like the tensor itself; notes that it is."""

    def __init__(self, tensor: StoredTensor, used: list[StoredTensor]) -> None:
        self._tensor = tensor
        self._used = used

    def __getitem__(self, _: EllipsisType) -> Tensor:
        self._used.append(self._tensor)
        return torch.empty(self._tensor.shape, device=META)


def rehearse(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> Rehearsal:
    """Load a checkpoint into a model on torch's meta device, reading nothing."""
    used: list[StoredTensor] = []
    rules: Any = get_model_conversion_mapping(model)
    with without_progress_bars():
        report, _ = convert_and_load_state_dict_in_model(
            model,
            {name: _Shadow(tensor, used) for name, tensor in stored.items()},
            LoadStateDictConfig(device_map={"": META}, weight_mapping=rules),
        )
    # Of tensors that are tied, one is enough.
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    missing = report.missing_keys - report.conversion_errors.keys()
    if not tied <= missing:
        missing -= tied
    return Rehearsal(
        missing=sorted(missing),
        misfits=sorted((n, tuple(given), tuple(own)) for n, given, own in report.mismatched_keys),
        errors=report.conversion_errors,
        used=used,
    )


def rehearse_names(model: PreTrainedModel, names: Iterable[str]) -> Rehearsal:
    """Rehearse where only the tensors' names are known: what is missing, and what is used."""
    return rehearse(model, {name: StoredTensor(Path(), name, "", (), 0, 0) for name in names})
