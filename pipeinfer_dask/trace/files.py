"""Traces in files: JSON lines, a header and then an entry a line.

Nothing is pickled, and each value is held against the type that its field has: a file that
loads is a trace. Floats are written as their shortest exact form, so that a trace comes back
as it was.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pipeinfer_dask.protocol.messages import (
    LEFT_OUT,
    Command,
    Commit,
    Drafted,
    Event,
    RunDone,
    StartDraft,
    StartRun,
)
from pipeinfer_dask.trace.record import Trace

FORMAT = "pipeinfer_dask trace"
VERSION = 1
KINDS: dict[str, Any] = {kind.__name__: kind for kind in get_args(Command | Event)}


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace."""
    records = list(trace.records)
    texts = {}
    for token in {token for _, what in records for token in _tokens(what)}:
        try:
            texts[token] = trace.texts[token]
        except LookupError:
            continue
    header = {
        "format": FORMAT,
        "version": VERSION,
        "stages": trace.stages,
        "records": len(records),
        "texts": texts,
        "pieces": list(trace.pieces),
    }
    with Path(path).open("w", encoding="ascii") as file:
        file.write(json.dumps(header) + "\n")
        for time, what in records:
            file.write(json.dumps([time, type(what).__name__, _plain(what)]) + "\n")


def load(
    path: str | os.PathLike[str],
) -> tuple[int, list[tuple[float, Event | Command]], dict[int, str], list[str]]:
    """Return a trace's fields, in order.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it holds no trace, a damaged one, or one of a later version.
    """
    with Path(path).open(encoding="ascii") as file:
        try:
            header = json.loads(file.readline())
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise ValueError
        except (ValueError, RecursionError):
            raise ValueError(
                f"expected a trace that Trace.save wrote, got {os.fspath(path)}: name another file"
            ) from None
        if header.get("version") != VERSION:
            raise ValueError(
                f"expected a trace of version {VERSION}, got {header.get('version')!r} in "
                f"{os.fspath(path)}: read it with the pipeinfer_dask that wrote it"
            )
        lines = 1
        try:
            stages = _checked(int, header["stages"])
            if stages < 1:
                raise ValueError(f"{stages} stages")
            texts = {int(token): _checked(str, text) for token, text in header["texts"].items()}
            pieces = [_checked(str, piece) for piece in _checked(list, header["pieces"])]
            records: list[tuple[float, Event | Command]] = []
            for text in file:
                lines += 1
                time, kind, values = json.loads(text)
                records.append((_reader(float)(time), _reader(KINDS[kind])(values)))
            if len(records) != header["records"]:
                raise ValueError(f"{len(records)} entries instead of {header['records']!r}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged at line {lines} ({error}): save the trace again"
            ) from error
    return stages, records, texts, pieces


def _tokens(what: Event | Command) -> tuple[int, ...]:
    """Return the token ids that an entry names."""
    match what:
        case StartRun() | StartDraft():
            return what.batch.tokens
        case Drafted():
            return tuple(proposal.token for proposal in what.proposals)
        case Commit():
            return what.tokens
        case RunDone(tokens=tuple() as tokens):
            return tuple(token for token in tokens if token != LEFT_OUT)
        case _:
            return ()


def _plain(value: Any) -> Any:
    """Return a message as JSON takes it."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _checked(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r:.40}")
    return value


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Return what turns plain JSON back into a value of this type, or raises."""
    if get_origin(kind) in (Union, types.UnionType):
        return _one_of(get_args(kind))
    if get_origin(kind) is tuple:
        first, *others = get_args(kind)
        if others != [...]:
            readers = [_reader(each) for each in (first, *others)]
            return lambda value: tuple(
                [read(item) for read, item in zip(readers, _checked(list, value), strict=True)]
            )
        read = _reader(first)
        return lambda value: tuple([read(item) for item in _checked(list, value)])
    if is_dataclass(kind):
        return _message(kind)
    assert isinstance(kind, type)
    if issubclass(kind, Enum):
        return kind
    if kind is float:
        return lambda value: float(value) if type(value) is int else _checked(float, value)
    return lambda value: _checked(kind, value)


def _message(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields(kind)}

    def read(value: Any) -> Any:
        if _checked(dict, value).keys() != readers.keys():
            raise TypeError(f"{kind.__name__} has other fields than {', '.join(value)}")
        return kind(**{name: reader(value[name]) for name, reader in readers.items()})

    return read


def _one_of(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Return a reader for one of these types: the first that fits."""
    readers = [_reader(kind) for kind in kinds if kind is not type(None)]

    def read(value: Any) -> Any:
        if value is None and type(None) in kinds:
            return None
        for reader in readers[:-1]:
            try:
                return reader(value)
            except TypeError:
                continue
        return readers[-1](value)

    return read
