"""What one pass takes: the same five columns on the host and on the device."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
T = TypeVar("T")


class Inputs(NamedTuple, Generic[T]):
    """Arrays or tensors for a pass of n tokens.

    Attributes
    ----------
    given : int64 [n], or of a floating type [n, hidden_size]
        Token ids on the first stage, and hidden states on the others.
    positions : int64, [n]
        The tokens' places in the text.
    slots : int64, [n]
        Where their keys and values go.
    allowed : bool, [n, filled]
        Whether a token attends to a slot.
    held : int64, [filled]
        The places in the text of the tokens in the slots.
    """

    given: T
    positions: T
    slots: T
    allowed: T
    held: T


def padded(inputs: Inputs[Numbers], size: int, filled: int, scratch: int) -> Inputs[Numbers]:
    """Add tokens up to ``size`` and slots up to ``filled``, which change nothing for the rest.

    An added token writes to the slot ``scratch``, beyond those that are looked at, so its own
    keys and values are nobody's. It attends to slot 0 alone, from the same place in the text,
    as every family allows: a row that attends to nothing would be NaN, and what is no number
    is slow or worse in some operations.
    """
    n, before = inputs.allowed.shape
    allowed = np.zeros((size, filled), dtype=np.bool_)
    allowed[:n, :before] = inputs.allowed
    allowed[n:, 0] = True
    given = np.zeros((size, *inputs.given.shape[1:]), inputs.given.dtype)
    given[:n] = inputs.given
    return Inputs(
        given,
        np.concatenate((inputs.positions, np.full(size - n, inputs.held[0]))),
        np.concatenate((inputs.slots, np.full(size - n, scratch))),
        allowed,
        np.concatenate((inputs.held, np.zeros(filled - before, np.int64))),
    )
