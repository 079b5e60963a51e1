"""Matrices held in 16 bits and multiplied in 32: what makes verifying several tokens nearly free.

Generating is bound by reading weights. FBGEMM's kernels read them as float16, half the
bytes, and multiply in float32, and take hardly longer for six tokens than for one. A
float16 checkpoint loses nothing by it. Of a bfloat16 one, values below 2**-14 are rounded,
by 2**-25 at most; a matrix with a value beyond float16 stays in float32. Activations,
norms and sums are float32 throughout. Where torch has no such kernels, all is float32.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = Literal["auto", "fp16", "fp32"]
"""How matrices are held: "auto" is "fp16" where the checkpoint is of 16 bits, else "fp32"."""

LARGEST = torch.finfo(torch.float16).max
SMALLEST_PART = 2**20
"""Elements worth handing to another thread, which takes as long as multiplying by so many."""
LARGEST_PART = 2**24
"""Elements packed at once: as many float32 values are in memory meanwhile."""


def check_weights(weights: object) -> None:
    """Check that there is such a way to hold weights.

    Raises
    ------
    ValueError
        If there is not.
    """
    if weights not in get_args(Weights):
        known = ", ".join(map(repr, get_args(Weights)))
        raise ValueError(f"expected weights to be one of {known}, got {weights!r}")


@cache
def has_kernels() -> bool:
    """Say whether torch can multiply by float16 matrices on this machine; tried out, once."""
    matrix, x = torch.arange(-24.0, 24.0).view(6, 8), torch.arange(16.0).view(2, 8)
    try:
        with warnings.catch_warnings():
            # Each says once in a process that it may go some day; then this says false.
            warnings.simplefilter("ignore")
            packed = torch.fbgemm_pack_gemm_matrix_fp16(matrix)
            product = torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, None)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product, F.linear(x, matrix))


class PackedLinear(nn.Module):
    """What `nn.Linear` computes, by a float16 matrix.

    Parameters
    ----------
    weight : Tensor, [out_features, in_features]
        Of any float type and in any order; not kept.
    bias : Tensor, [out_features], or None
    pool : ThreadPoolExecutor or None
        Threads beside the calling one; the rows of large matrices are shared among them all.
    threads : int
        How many they are together.
    room : Tensor of float32, [LARGEST_PART], optional
        Where parts are converted, so that packing many matrices leaves no holes in memory.

    Raises
    ------
    OverflowError
        If a value is beyond float16.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        pool: ThreadPoolExecutor | None = None,
        threads: int = 1,
        room: Tensor | None = None,
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.in_features, self.out_features = columns, rows
        shares = min(threads, max(1, weight.numel() // SMALLEST_PART))
        step = min(-(-rows // shares), LARGEST_PART // columns)
        room = torch.empty(LARGEST_PART) if room is None else room
        parts = []
        for start in range(0, rows, step):
            part = slice(start, start + step)
            stored = weight[part]
            values = room[: stored.numel()].view(stored.shape).copy_(stored)
            low, high = torch.aminmax(values)
            if not -LARGEST <= low <= high <= LARGEST:
                raise OverflowError(f"values from {low} to {high} are beyond float16")
            packed = torch.fbgemm_pack_gemm_matrix_fp16(values)
            parts.append((packed, None if bias is None else bias[part].float().contiguous()))
        size = -(-len(parts) // shares)
        self._shares = [parts[start : start + size] for start in range(0, len(parts), size)]
        self._only = parts[0] if len(parts) == 1 else None
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., in_features]: [..., out_features]."""
        if self._only is not None:
            return torch.fbgemm_linear_fp16_weight_fp32_activation(x, *self._only)
        *others, mine = self._shares
        if self._pool is None:
            products = [product for share in self._shares for product in _products(x, share)]
        else:
            handed = [self._pool.submit(_products, x, share) for share in others]
            last = _products(x, mine)
            products = [product for share in handed for product in share.result()] + last
        return torch.cat(products, dim=-1)


def _products(x: Tensor, share: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    return [
        torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, bias) for packed, bias in share
    ]


class StoredEmbedding(nn.Module):
    """What `nn.Embedding` computes, held as it is stored: [rows, dim], rows become float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # some families ask it for its device

    def forward(self, ids: Tensor) -> Tensor:
        """Look up [...]: [..., dim]."""
        return F.embedding(ids, self.weight).float()
