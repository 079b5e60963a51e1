"""Whether a value is what a type hint says: for what came from outside, and its dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import repeat
from operator import attrgetter, call
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

Check = Callable[[Any], bool]

WHOLE = {int}
LEAST, MOST = -1, 2**63 - 1
"""Whole numbers are ids, counts and places, or -1 for none; arrays hold 64 bits."""


def is_a(hint: Any, value: object) -> bool:
    """Return whether a value is what a type hint says.

    Parameters
    ----------
    hint : type
        Of numbers, text, enums, tuples, unions and dataclasses of these. Numbers are finite or
        infinite, whole ones from -1 to 2**63 - 1, and a bool is none of them.
    value : object
    """
    return _check_of(hint)(value)


@cache
def _check_of(hint: Any) -> Check:
    if hint is int:
        return lambda value: type(value) is int and LEAST <= value <= MOST
    if hint is float:
        return lambda value: type(value) in (float, int) and value == value  # nan is not itself
    if hint in (bool, str, NoneType):
        return lambda value: type(value) is hint
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        checks = [_check_of(argument) for argument in arguments]
        return lambda value: any(map(call, checks, repeat(value)))
    if origin is tuple:
        return _check_of_tuple(arguments)
    if is_dataclass(hint):
        return _check_of_fields(hint)
    kind = origin or hint
    if not issubclass(kind, Enum):
        # Nothing that is read from a header is of such a type.
        return lambda value: False
    return lambda value: isinstance(value, kind)


def _check_of_tuple(arguments: tuple[Any, ...]) -> Check:
    if arguments == (int, ...):  # most of a run: looked at in C
        return lambda value: (
            type(value) is tuple
            and (
                not value
                or ({*map(type, value)} == WHOLE and min(value) >= LEAST and max(value) <= MOST)
            )
        )
    if arguments[-1] is ...:
        each = _check_of(arguments[0])
        return lambda value: type(value) is tuple and all(map(each, value))
    checks = [_check_of(argument) for argument in arguments]
    return lambda value: (
        type(value) is tuple and len(value) == len(checks) and all(map(call, checks, value))
    )


def _check_of_fields(kind: Any) -> Check:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    checks = [_check_of(hints[name]) for name in names]
    if not names:
        return lambda value: type(value) is kind
    # The class beside the fields: of one name alone, `attrgetter` would make no tuple.
    take = attrgetter(*names, "__class__")
    return lambda value: type(value) is kind and all(map(call, checks, take(value)))
