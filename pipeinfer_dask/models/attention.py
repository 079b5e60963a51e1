"""Attention over slots, for every family: the two functions that transformers looks up by name.

The mask is the family's own (causal, sliding, chunked), told by positions, and-ed with
the ancestors of each token. Heads that share keys and values are packed into the rows of
one product, so that the cache is read once and never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SLOT_ATTENTION = "pipeinfer_slots"
"""The name to give as ``attn_implementation``."""

MaskFunction = Callable[..., Any]
"""A family's: whether (batch, head, query position, key position) may attend."""


class Pass(NamedTuple):
    """What the models of this thread attend to, and what was made of it.

    Masks are known by their identity: a family's forward keeps them until the pass ends, so that
    no other takes one's id.
    """

    allowed: Tensor
    positions: Tensor
    held: Tensor
    functions: dict[int, MaskFunction]
    """The families' functions by which masks were made."""
    repeated: dict[int, Tensor]
    """Masks repeated for the heads of a group: all layers' alike."""


_current: ContextVar[Pass] = ContextVar("pass")


@contextmanager
def attending(allowed: Tensor, positions: Tensor, held: Tensor) -> Iterator[Pass]:
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
    told = Pass(allowed, positions, held, {}, {})
    token = _current.set(told)
    try:
        yield told
    finally:
        _current.reset(token)


def token_positions() -> Tensor:
    """Return the places in the text of the tokens at hand, int64 [n]."""
    return _current.get().positions


def slot_positions() -> Tensor:
    """Return the places in the text of the tokens in the slots that are looked at, [filled]."""
    return _current.get().held


def slot_mask(*, mask_function: MaskFunction, dtype: torch.dtype, **_: Any) -> Tensor:
    """Make the additive mask, [1, 1, n, filled], of 0 and -inf.

    What is not named is what else transformers tells every mask.
    """
    told = _current.get()
    mask = additive(told.allowed, told.positions, told.held, mask_function, dtype)[None, None]
    told.functions[id(mask)] = mask_function
    return mask


def additive(
    allowed: Tensor,
    positions: Tensor,
    held: Tensor,
    mask_function: MaskFunction,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Make a mask of 0 and -inf, [n, filled], by what `attending` takes and a family's function."""
    # An ancestor always comes earlier, so the causal mask adds nothing.
    if mask_function is not causal_mask_function:
        allowed = allowed & mask_function(0, 0, positions[:, None], held[None, :])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, -torch.inf)


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
    if attention_mask.shape[1] > 1:
        attention_mask = attention_mask.reshape(1, kv_heads, rows, -1)
    elif n > 1:
        attention_mask = _repeat(attention_mask, heads // kv_heads)
    packed = query.reshape(1, kv_heads, rows, dim)
    attended = packed_attention(packed, key, value, attention_mask, scaling, softcap, s_aux)
    return attended.view(1, heads, n, -1).transpose(1, 2).contiguous(), None


def packed_attention(
    packed: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attend with rows [1, kv_heads, rows, d]: all tokens of a group's first head come first.

    The mask is [1, 1 or kv_heads, 1 or rows, filled]; for the rest see `slot_attention`.
    """
    if softcap is None and s_aux is None:
        return F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    kv_heads, rows, dim = packed.shape[1:]
    scores = packed @ key.transpose(-1, -2) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if s_aux is not None:
        sinks = s_aux.repeat_interleave(kv_heads * rows // len(s_aux)).view(1, kv_heads, rows, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    return scores.softmax(dim=-1)[..., : key.shape[2]] @ value


def _repeat(mask: Tensor, times: int) -> Tensor:
    known = _current.get().repeated
    if id(mask) not in known:
        known[id(mask)] = mask.repeat(1, 1, times, 1)
    return known[id(mask)]


ALL_MASK_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_mask)
ALL_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_attention)
