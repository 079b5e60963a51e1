"""What a checkpoint's safetensors files hold, told from their headers alone.

A file begins with the length of its header, then the header (JSON: for each tensor its
type, shape and place), then the bytes of the tensors. So everything that can be wrong
with the files is seen before a single weight is read, and each stage reads only the
tensors that it owns, from files that other machines need not have.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from threading import Lock
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from pipeinfer_dask.models.sources import INDEX_FILE, weights_in
from pipeinfer_dask.models.stage import CountBytes

FLOAT_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What weights may be stored as."""
LENGTH_BYTES = 8
CORRUPT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading JSON raises that is not as it should be, or nested without end."""

READ_BYTES = 4 << 20
"""Files are read in pieces of this size; after each, progress is told."""
TOLD = 100
"""Progress is told about so many times for a shard."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes
    ----------
    file : Path
    name : str
    dtype : str
        As safetensors calls it, such as ``"BF16"``.
    shape : tuple of int
    offset : int
        Where in the file its bytes begin.
    nbytes : int
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Reading:
    """Reads tensors as they are asked for, from any threads, and counts the bytes.

    Each tensor is a mapping of its own. What is computed in the dtype in which it is stored
    costs no memory beyond the file's pages, and what is converted lets go of them at once. The
    bytes are read beforehand all the same, for else a first run would wait for the disk.
    """

    def __init__(self, total: int, count: CountBytes | None) -> None:
        self._total = total
        self._count = count
        self._lock = Lock()
        self._read = 0
        self._told = 0

    def tensor(self, stored: StoredTensor) -> Tensor:
        if stored.nbytes == 0:
            return torch.empty(stored.shape, dtype=FLOAT_TYPES[stored.dtype])
        before = stored.offset % ALLOCATIONGRANULARITY
        with stored.file.open("rb", buffering=0) as opened:
            self._into_cache(opened, stored)
            # To write to it, which nobody does, would not change the file.
            pages = mmap(
                opened.fileno(),
                before + stored.nbytes,
                access=ACCESS_COPY,
                offset=stored.offset - before,
            )
        numbers = torch.frombuffer(pages, dtype=torch.uint8, count=stored.nbytes, offset=before)
        dtype = FLOAT_TYPES[stored.dtype]
        if stored.offset % dtype.itemsize:
            numbers = numbers.clone()  # from a writer that did not align its tensors
        return numbers.view(dtype).view(stored.shape)

    def _into_cache(self, opened: FileIO, stored: StoredTensor) -> None:
        # A mapping goes back to the system when it is let go of; the heap might keep it.
        piece = memoryview(mmap(-1, min(READ_BYTES, stored.nbytes)))
        left = stored.nbytes
        opened.seek(stored.offset)
        while left > 0 and (came := opened.readinto(piece[:left])):
            left -= came
            self._add(came)

    def _add(self, came: int) -> None:
        if self._count is None:
            return
        with self._lock:
            self._read += came
            if self._read - self._told < self._total / TOLD and self._read < self._total:
                return
            self._told = self._read
            self._count(self._read, self._total)


@dataclass(frozen=True, slots=True)
class Unread:
    """A tensor that is read when it is indexed with ``[...]``."""

    stored: StoredTensor
    reading: Reading

    def __getitem__(self, _: EllipsisType) -> Tensor:
        return self.reading.tensor(self.stored)


def unread(
    stored: Mapping[str, StoredTensor], count: CountBytes | None = None
) -> dict[str, Unread]:
    """Give tensors that are read when they are indexed with ``[...]``.

    Parameters
    ----------
    stored : mapping of str to StoredTensor
        Of floating types.
    count : callable, optional
        Told of the bytes that were read so far, and of all.
    """
    reading = Reading(sum(tensor.nbytes for tensor in stored.values()), count)
    return {name: Unread(tensor, reading) for name, tensor in stored.items()}


def usual_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """Return what most bytes of the matrices are stored as; None if there are none."""
    sizes = Counter[torch.dtype]()
    for tensor in stored.values():
        if len(tensor.shape) > 1 and tensor.dtype in FLOAT_TYPES:
            sizes[FLOAT_TYPES[tensor.dtype]] += tensor.nbytes
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else None


def listed_tensors(directory: Path) -> dict[str, str] | None:
    """Return the file of each tensor by the index; None if a model is in one file.

    Raises
    ------
    ValueError
        If the index is none.
    """
    index = directory / INDEX_FILE
    if not index.is_file():
        return None
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        return {str(tensor): str(file) for tensor, file in files.items()}
    except CORRUPT as error:
        raise ValueError(f"{index} is no index of safetensors files: download it again") from error


def stored_tensors(
    directory: Path, wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint by name; only files that hold wanted ones need be there.

    Raises
    ------
    FileNotFoundError
        If there are no safetensors, or a file with a wanted tensor is not there.
    ValueError
        If a file is truncated or corrupt, or does not hold what the index says.
    """
    files = listed_tensors(directory)
    if files is None:
        held = _read_header(weights_in(directory))
        return {name: tensor for name, tensor in held.items() if wanted(name)}
    needed = {tensor: file for tensor, file in files.items() if wanted(tensor)}
    headers: dict[str, dict[str, StoredTensor]] = {}
    for tensor, file in needed.items():
        if file in headers:
            continue
        if not (directory / file).is_file():
            raise FileNotFoundError(
                f"{directory / file} is not there, which holds {tensor} by the index: "
                "download it again"
            )
        headers[file] = _read_header(directory / file)
    for tensor, file in needed.items():
        if tensor not in headers[file]:
            raise ValueError(f"{directory / file} lacks {tensor}, which {INDEX_FILE} says it holds")
    return {tensor: headers[file][tensor] for tensor, file in needed.items()}


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
    begin = LENGTH_BYTES + length
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(file, name, entry, begin) for name, entry in entries.items()}
    except CORRUPT as error:
        raise ValueError(f"{file} has a corrupt header: download it again") from error
    expected = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=begin)
    if size != expected:
        raise ValueError(
            f"{file} has {size} bytes, but its header speaks of {expected}: download it again"
        )
    return tensors


def _entry(file: Path, name: str, entry: Mapping[str, Any], begin: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    number = FLOAT_TYPES.get(dtype)
    size = number.itemsize * math.prod(shape) if number is not None else stop - start
    if not 0 <= start <= stop or stop - start != size:
        raise ValueError(f"{name} has {stop - start} bytes")
    return StoredTensor(file, name, dtype, shape, begin + start, stop - start)
