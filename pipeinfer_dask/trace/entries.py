"""Entries of a trace as text, a line of JSON each: in files, and on their way to a far client.

Nothing is pickled, and each value is held against the type that its field has. Floats are
written as their shortest exact form, so that an entry comes back as it was.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from pipeinfer_dask.protocol.messages import Command, Drafted, Event, RunDone, Span, WakeAt

KINDS: dict[str, Any] = {kind.__name__: kind for kind in get_args(Command | Event)}


def written(time: float, what: Event | Command) -> str:
    """Return an entry as a line, without its end."""
    return json.dumps([time, type(what).__name__, _plain(what)])


def read_entry(line: str) -> tuple[float, Event | Command]:
    """Return the entry of a line.

    Raises
    ------
    ValueError, TypeError, KeyError, AttributeError or RecursionError
        If it is none.
    """
    time, kind, values = json.loads(line)
    return _reader(float)(time), _reader(KINDS[kind])(values)


def earlier(what: Event | Command, seconds: float) -> Event | Command:
    """Return an event or a command with the times in it on a clock that is so much behind."""

    def moved(span: Span) -> Span:
        return replace(span, began=span.began - seconds, ended=span.ended - seconds)

    match what:
        case RunDone(spans=spans):
            return replace(what, spans=tuple(map(moved, spans)))
        case Drafted(span=Span() as span):
            return replace(what, span=moved(span))
        case WakeAt(time=time):
            return replace(what, time=time - seconds)
        case _:
            return what


def checked(kind: type[Any], value: Any) -> Any:
    """Return a value that is of this very type. Raises a TypeError if it is not."""
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r:.40}")
    return value


def _plain(value: Any) -> Any:
    """Return a message as JSON takes it."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
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
                [read(item) for read, item in zip(readers, checked(list, value), strict=True)]
            )
        read = _reader(first)
        return lambda value: tuple([read(item) for item in checked(list, value)])
    if is_dataclass(kind):
        return _message(kind)
    assert isinstance(kind, type)
    if issubclass(kind, Enum):
        return kind
    if kind is float:
        return lambda value: float(value) if type(value) is int else checked(float, value)
    return lambda value: checked(kind, value)


def _message(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields(kind)}

    def read(value: Any) -> Any:
        if checked(dict, value).keys() != readers.keys():
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
