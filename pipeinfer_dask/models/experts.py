"""Experts of a mixture, held like other matrices: those alone are computed that a token chose.

Families in transformers hold the matrices of a layer's experts in two tensors of three
dimensions, and nearly all describe and call them in one way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MATRICES = ("gate_up_proj", "down_proj")
"""What the two tensors are called."""


def holds_experts(module: nn.Module) -> bool:
    """Say whether these are the experts of a layer, in a form that `PackedExperts` knows."""
    return all(getattr(getattr(module, name, None), "ndim", 0) == len("eoi") for name in MATRICES)


class PackedExperts(nn.Module):
    """What a layer's experts compute.

    Parameters
    ----------
    experts : nn.Module
        The family's own, see `holds_experts`; its matrices are taken away.
    hold : callable
        Makes what multiplies by a matrix [out_features, in_features] and adds a bias or None.
    """

    def __init__(self, experts: Any, hold: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
        super().__init__()
        transposed: bool = getattr(experts, "is_transposed", True)
        held = []
        for name in MATRICES:
            matrices = getattr(experts, name).detach()
            biases = getattr(experts, f"{name}_bias", None)
            delattr(experts, name)
            held.append(
                nn.ModuleList(
                    hold(
                        matrix.T if transposed else matrix,
                        None if biases is None else biases[number].detach(),
                    )
                    for number, matrix in enumerate(matrices)
                )
            )
            del matrices
        self.up, self.down = held
        self._gate: Callable[[Tensor], Tensor] = getattr(experts, "_apply_gate", None) or (
            lambda x: experts.act_fn(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1]
        )

    def forward(
        self, x: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Compute [n, hidden_size] by k experts for each token, their sum weighted.

        Parameters
        ----------
        x : Tensor, [n, hidden_size]
        top_k_index : Tensor of int64, [n, k], optional
            Llama 4 has none: it gives each expert in turn all tokens, [experts * n, hidden_size],
            those multiplied by zero that did not choose it, and gets as many back.
        top_k_weights : Tensor, [n, k], optional
        """
        if top_k_index is None or top_k_weights is None:
            rows = x.any(dim=-1).nonzero().flatten()
            result = torch.zeros_like(x)
            if len(rows):
                result[rows] = self._computed(x[rows], rows // (len(x) // len(self.up)))
            return result
        chosen = top_k_index.flatten()
        order = chosen.argsort()
        computed = self._computed(x[order // top_k_index.shape[1]], chosen[order])
        result = torch.empty_like(computed)
        result[order] = computed * top_k_weights.flatten()[order, None]
        return result.view(*top_k_index.shape, -1).sum(dim=1)

    def _computed(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Compute each row of [m, hidden_size] by its expert, [m] in ascending order."""
        experts, sizes = (part.tolist() for part in chosen.unique_consecutive(return_counts=True))
        for matrices in (self.up, self.down):
            products = [
                matrices[expert](rows) for expert, rows in zip(experts, x.split(sizes), strict=True)
            ]
            x = torch.cat(products)
            if matrices is self.up:
                x = self._gate(x)
        return x
