"""Which parts of a model are held in 16 bits, and how they come to be without a whole copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeinfer_dask.models.experts import MATRICES, PackedExperts, holds_experts
from pipeinfer_dask.models.helpers import Helpers
from pipeinfer_dask.models.linears import LARGEST_PART, PackedLinear, StoredEmbedding
from pipeinfer_dask.models.tensors import StoredTensor, usual_dtype

STORED_AS = {"F16": torch.float16, "BF16": torch.bfloat16}


def keep_stored(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Have a model without memory load its large matrices as they are stored, for `pack`.

    What is not packed is loaded as float32.
    """
    kinds = {tensor.dtype for tensor in stored.values() if len(tensor.shape) > 1}
    usual = usual_dtype(stored)
    for path, module in model.named_modules():
        for name in _matrices(module):
            known = stored.get(f"{path}.{name}")
            if known is not None:
                dtype = STORED_AS.get(known.dtype)
            # Some families' modules have other names than what is stored. Where types are
            # mixed, what is merged from many tensors is of the usual one; a router may not be.
            elif len(kinds) == 1 or holds_experts(module):
                dtype = usual
            else:
                dtype = None
            if dtype in STORED_AS.values():
                matrix = torch.empty_like(getattr(module, name), dtype=dtype)
                setattr(module, name, nn.Parameter(matrix, requires_grad=False))


def pack(model: PreTrainedModel, *, everything: bool, threads: int) -> None:
    """Have a loaded model compute from 16 bits, without a whole copy.

    Parameters
    ----------
    model : PreTrainedModel
        Its linears, experts and embeddings are replaced, one after the other.
    everything : bool
        Pack what is stored in 32 bits, too.
    threads : int
        Threads that share a multiplication.
    """
    helpers = Helpers(threads)
    room = torch.empty(LARGEST_PART)

    def hold(matrix: Tensor, bias: Tensor | None) -> nn.Module:
        try:
            return PackedLinear(matrix, bias, helpers=helpers, room=room)
        except OverflowError:
            rows, columns = matrix.shape
            wide = nn.Linear(columns, rows, bias=bias is not None, device="meta")
            wide.weight = nn.Parameter(matrix.float(), requires_grad=False)
            if bias is not None:
                wide.bias = nn.Parameter(bias.float(), requires_grad=False)
            return wide

    parent: Any
    module: Any
    # By name, for whoever held the modules would hold their matrices until all are packed.
    for parent in [module for module in model.modules() if not _matrices(module)]:
        for place in [name for name, _ in parent.named_children()]:
            module = getattr(parent, place)
            names = _matrices(module)
            narrow = any(getattr(module, name).dtype != torch.float32 for name in names)
            if not names or not (narrow or everything):
                continue
            if holds_experts(module):
                setattr(parent, place, PackedExperts(module, hold))
            elif _is_linear(module):
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                setattr(parent, place, hold(weight, module.bias))
            elif narrow:
                setattr(parent, place, StoredEmbedding(module.weight.detach()))


def _matrices(module: nn.Module) -> tuple[str, ...]:
    """Name a module's own matrices, where they can be held in 16 bits."""
    if holds_experts(module):
        return MATRICES
    return ("weight",) if _is_linear(module) or _is_table(module) else ()


def _is_table(module: Any) -> bool:
    # Subclasses scale or shift what they look up.
    return type(module) is nn.Embedding and module.max_norm is None


def _is_linear(module: Any) -> bool:
    return type(module) is Conv1D or (isinstance(module, nn.Linear) and _is_plain(type(module)))


def _is_plain(kind: type[nn.Linear]) -> bool:
    """Say whether a kind of linear computes what its base does, however it is written."""
    if kind is nn.Linear:
        return True
    # While transformers builds a model, what is made has no memory and no values of its own.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        try:
            example = kind(4, 3)
        except TypeError:
            return False
        for parameter in example.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
        x = torch.linspace(-1, 1, 8).view(2, 4)
        return torch.allclose(example(x), F.linear(x, example.weight, example.bias))
