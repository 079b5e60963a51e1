"""Matrices held in 16 bits and multiplied in 32: what makes verifying several tokens nearly free.

Generating is bound by reading weights. FBGEMM's kernels read them as float16, half the
bytes, and multiply in float32, and take hardly longer for six tokens than for one. A
float16 checkpoint loses nothing by it. Of a bfloat16 one, values below 2**-14 are rounded,
by 2**-25 at most; a matrix with a value beyond float16 stays in float32. Activations,
norms and sums are float32 throughout. Where torch has no such kernels, all is float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain, islice
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeinfer_dask.models.helpers import Helpers

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


class Part(NamedTuple):
    """Some rows of a matrix, packed, and of what is added to the product."""

    packed: Tensor
    bias: Tensor | None
    rows: int


class PackedLinear(nn.Module):
    """What `nn.Linear` computes, by a float16 matrix.

    Parameters
    ----------
    weight : Tensor, [out_features, in_features]
        Of any float type and in any order; not kept.
    bias : Tensor, [out_features], or None
    helpers : Helpers, optional
        Threads that share the rows of a large matrix.
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
        helpers: Helpers | None = None,
        room: Tensor | None = None,
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.in_features, self.out_features = columns, rows
        self.helpers = helpers or Helpers(1)
        shares = min(self.helpers.threads, max(1, weight.numel() // SMALLEST_PART))
        step = min(-(-rows // shares), LARGEST_PART // columns)
        room = torch.empty(LARGEST_PART) if room is None else room
        self.parts: list[Part] = []
        for start in range(0, rows, step):
            part = slice(start, start + step)
            stored = weight[part]
            values = room[: stored.numel()].view(stored.shape).copy_(stored)
            low, high = torch.aminmax(values)
            if not -LARGEST <= low <= high <= LARGEST:
                raise OverflowError(f"values from {low} to {high} are beyond float16")
            packed = torch.fbgemm_pack_gemm_matrix_fp16(values)
            added = None if bias is None else bias[part].float().contiguous()
            self.parts.append(Part(packed, added, len(stored)))
        self._products = Products([self.parts], self.helpers)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., in_features]: [..., out_features]."""
        if len(self.parts) == 1:
            return _product(x, self.parts[0])
        return self._products(x)[0]


class Products:
    """The products of one input by several matrices, each in parts, handed to helpers at one go."""

    def __init__(self, matrices: Sequence[Sequence[Part]], helpers: Helpers) -> None:
        self._helpers = helpers
        self._sizes = [len(parts) for parts in matrices]
        parts = list(chain.from_iterable(matrices))
        shares: list[list[int]] = [[] for _ in range(helpers.threads)]
        # The largest first, each to who has least to do.
        for place in sorted(range(len(parts)), key=lambda place: -parts[place].rows):
            min(shares, key=lambda share: sum(parts[other].rows for other in share)).append(place)
        places = list(chain.from_iterable(shares))
        self._shares = [[parts[place] for place in share] for share in shares if share]
        self._order = sorted(range(len(places)), key=places.__getitem__)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Multiply [..., in_features]: by each matrix, [..., out_features]."""
        made = self._helpers.call([partial(_multiplied, x, share) for share in self._shares])
        flat = list(chain.from_iterable(made))
        parts = iter([flat[place] for place in self._order])
        return [
            next(parts) if size == 1 else torch.cat(list(islice(parts, size)), dim=-1)
            for size in self._sizes
        ]


def _multiplied(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    return [_product(x, part) for part in parts]


def _product(x: Tensor, part: Part) -> Tensor:
    return torch.fbgemm_linear_fp16_weight_fp32_activation(x, part.packed, part.bias)


def together(linears: Sequence[nn.Module]) -> Callable[[Tensor], list[Tensor]]:
    """Return what computes several linears of one input, handed to helpers at one go."""
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    if len(packed) == len(linears) and packed[0].helpers.threads > 1:
        return Products([linear.parts for linear in packed], packed[0].helpers)
    # Called without what modules do around it: they have no hooks.
    forwards = [linear.forward for linear in linears]
    return lambda x: [forward(x) for forward in forwards]


class StoredEmbedding(nn.Module):
    """What `nn.Embedding` computes, held as it is stored: [rows, dim], rows become float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # some families ask it for its device

    def forward(self, ids: Tensor) -> Tensor:
        """Look up [...]: [..., dim]."""
        return F.embedding(ids, self.weight).float()
