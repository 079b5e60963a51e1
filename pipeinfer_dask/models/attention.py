"""Attention over slots, for every family: the two functions that transformers looks up by name.

The mask is the family's own (causal, sliding, chunked), told by positions, and-ed with
the ancestors of each token. Heads that share keys and values are packed into the rows of
one product, so that the cache is read once and never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeinfer_dask.models.ancestry import Attendance

SLOT_ATTENTION = "pipeinfer_slots"
"""The name to give as ``attn_implementation``."""

_current: ContextVar[tuple[Attendance, Tensor]] = ContextVar("attendance")


@contextmanager
def attending(attendance: Attendance, positions: Tensor) -> Iterator[None]:
    """Have the models that this thread calls attend as told.

    Parameters
    ----------
    attendance : Attendance, of n tokens
    positions : Tensor of int64, [n]
        The tokens' places in the text.
    """
    token = _current.set((attendance, positions))
    try:
        yield
    finally:
        _current.reset(token)


def slot_mask(
    *, mask_function: Callable[..., Any], dtype: torch.dtype, device: torch.device, **_: Any
) -> Tensor | None:
    """Make the additive mask, [1, 1, n, filled], of 0 and -inf; None where all is attended to.

    ``mask_function`` is the family's: whether (batch, head, query position, key position)
    may attend. The rest is what transformers tells every mask.
    """
    attendance, positions = _current.get()
    allowed = torch.from_numpy(attendance.mask)
    # An ancestor always comes earlier, so the causal mask adds nothing.
    if mask_function is not causal_mask_function:
        slots = torch.from_numpy(attendance.positions)
        allowed = allowed & mask_function(0, 0, positions[:, None], slots[None, :])
    if allowed.all():
        return None
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
    return mask[None, None].to(device)


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with queries [1, heads, n, d] to keys [1, kv_heads, filled, d]: [1, n, heads, d]."""
    heads, n, dim = query.shape[1:]
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    if attention_mask is not None and n > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    packed = F.scaled_dot_product_attention(
        query.reshape(1, kv_heads, groups * n, dim),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return packed.view(1, heads, n, -1).transpose(1, 2).contiguous(), None


ALL_MASK_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_mask)
ALL_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_attention)
