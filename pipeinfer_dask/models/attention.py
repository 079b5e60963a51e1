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

SLOT_ATTENTION = "pipeinfer_slots"
"""The name to give as ``attn_implementation``."""

_current: ContextVar[tuple[Tensor, Tensor, Tensor]] = ContextVar("attendance")
_repeated: ContextVar[dict[int, Tensor]] = ContextVar("repeated")
"""The masks of this pass, by identity, repeated for the heads of a group: all layers' alike."""


@contextmanager
def attending(allowed: Tensor, positions: Tensor, held: Tensor) -> Iterator[None]:
    """Have the models that this thread calls attend as told. All is on the models' device.

    Parameters
    ----------
    allowed : Tensor of bool, [n, filled]
        Whether a token attends to a slot.
    positions : Tensor of int64, [n]
        The tokens' places in the text.
    held : Tensor of int64, [filled]
        The places in the text of the tokens in the slots.
    """
    tokens = _current.set((allowed, positions, held)), _repeated.set({})
    try:
        yield
    finally:
        _current.reset(tokens[0])
        _repeated.reset(tokens[1])


def token_positions() -> Tensor:
    """Return the places in the text of the tokens at hand, int64 [n]."""
    return _current.get()[1]


def slot_positions() -> Tensor:
    """Return the places in the text of the tokens in the slots that are looked at, [filled]."""
    return _current.get()[2]


def slot_mask(
    *, mask_function: Callable[..., Any], dtype: torch.dtype, device: torch.device, **_: Any
) -> Tensor:
    """Make the additive mask, [1, 1, n, filled], of 0 and -inf.

    ``mask_function`` is the family's: whether (batch, head, query position, key position)
    may attend. The rest is what transformers tells every mask.
    """
    allowed, positions, held = _current.get()
    # An ancestor always comes earlier, so the causal mask adds nothing.
    if mask_function is not causal_mask_function:
        allowed = allowed & mask_function(0, 0, positions[:, None], held[None, :])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, -torch.inf)[None, None]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with queries [1, heads, n, d] to keys [1, kv_heads, filled, d]: [1, n, heads, d].

    The mask is [1, 1, n, filled], or holds a bias for each head, [1, heads, n, filled].
    ``softcap`` bounds the scores, and ``s_aux``, [heads], is what each head may attend to
    instead of any token (an attention sink): transformers' own names.
    """
    heads, n, dim = query.shape[1:]
    kv_heads = key.shape[1]
    rows = heads // kv_heads * n
    packed = query.reshape(1, kv_heads, rows, dim)
    if attention_mask.shape[1] > 1:
        attention_mask = attention_mask.reshape(1, kv_heads, rows, -1)
    elif n > 1:
        attention_mask = _repeat(attention_mask, heads // kv_heads)
    if softcap is None and s_aux is None:
        attended = F.scaled_dot_product_attention(
            packed, key, value, attn_mask=attention_mask, scale=scaling
        )
    else:
        scores = packed @ key.transpose(-1, -2) * (dim**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + attention_mask
        if s_aux is not None:
            sinks = s_aux.repeat_interleave(n).view(1, kv_heads, rows, 1)
            scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
        attended = scores.softmax(dim=-1)[..., : key.shape[2]] @ value
    return attended.view(1, heads, n, -1).transpose(1, 2).contiguous(), None


def _repeat(mask: Tensor, times: int) -> Tensor:
    # The family's forward keeps its masks until the pass ends, so that no other takes one's id.
    known = _repeated.get()
    if id(mask) not in known:
        known[id(mask)] = mask.repeat(1, 1, times, 1)
    return known[id(mask)]


ALL_MASK_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_mask)
ALL_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_attention)
