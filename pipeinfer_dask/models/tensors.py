"""What a checkpoint's safetensors files hold, told from their headers alone.

A file begins with the length of its header, then the header (JSON: for each tensor its
type, shape and place), then the bytes of the tensors. So everything that can be wrong
with the files is seen before a single weight is read, and each stage reads only the
tensors that it owns.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from safetensors import safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, read (mapped into memory) when it is indexed with ``[...]``."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def __getitem__(self, _: EllipsisType) -> Tensor:
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.name)
        return tensor


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint by name.

    Raises
    ------
    FileNotFoundError
        If there are no safetensors, or the index names a file that is not there.
    ValueError
        If a file is truncated or corrupt, or does not hold what the index says.
    """
    index = directory / INDEX_FILE
    if not index.is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise FileNotFoundError(
                f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}: "
                "save the model's weights as safetensors"
            )
        return _read_header(directory / SINGLE_FILE)
    files = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(files.values())):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there: download it again")
        tensors |= _read_header(directory / name)
    for tensor, name in files.items():
        if tensor not in tensors:
            raise ValueError(f"{directory / name} lacks {tensor}, which {INDEX_FILE} says it holds")
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        return {str(tensor): str(file) for tensor, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: download it again") from error


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == LENGTH_BYTES else size
        if LENGTH_BYTES + length > size:
            raise ValueError(
                f"{file} is truncated or no safetensors file: it has {size} bytes, "
                "less than its header; download it again"
            )
        header = opened.read(length)
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        spans = {name: entry["data_offsets"] for name, entry in entries.items()}
        tensors = {
            name: StoredTensor(
                file,
                name,
                str(entry["dtype"]),
                tuple(entry["shape"]),
                spans[name][1] - spans[name][0],
            )
            for name, entry in entries.items()
        }
        expected = LENGTH_BYTES + length + max((stop for _, stop in spans.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file} has a corrupt header: download it again") from error
    if size != expected:
        raise ValueError(
            f"{file} has {size} bytes, but its header speaks of {expected}: download it again"
        )
    return tensors
