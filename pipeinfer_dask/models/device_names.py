"""What devices, and the numbers that they compute with, are called.

Apart from `devices`, as torch takes seconds to load: whoever only names a device does without.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

Dtype = Literal["float32", "float16", "bfloat16"]
"""What a stage computes in."""

CPU = "cpu"
NAMES = re.compile(r"cpu|cuda(:\d+)?")


def check_device(name: object) -> str:
    """Return a device's name: ``"cpu"``, ``"cuda"`` (a process's current GPU) or ``"cuda:N"``.

    Raises
    ------
    ValueError
        If it is none.
    """
    if not isinstance(name, str) or not NAMES.fullmatch(name):
        raise ValueError(f"expected a device as 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    return name


def check_dtype(dtype: object) -> None:
    """Check that there is such a dtype to compute in.

    Raises
    ------
    ValueError
        If there is not.
    """
    if dtype not in get_args(Dtype):
        known = ", ".join(map(repr, get_args(Dtype)))
        raise ValueError(f"expected dtype to be one of {known}, got {dtype!r}")
