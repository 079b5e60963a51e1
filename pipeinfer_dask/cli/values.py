"""Options whose values are more than a number or a word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal


def settings_of(options: Sequence[str]) -> dict[str, Any]:
    """Return what ``--set NAME=VALUE`` sets; a ValueError says what is none or given twice."""
    settings: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals):
            raise ValueError(f"expected --set NAME=VALUE, got {option!r}")
        if name in settings:
            raise ValueError(f"expected --set {name}=... once, got it twice: leave one out")
        try:
            # Python's True, False and None mean the same; other texts stay as they are.
            settings[name] = json.loads(value.lower() if value.isalpha() else value)
        except json.JSONDecodeError:
            raise ValueError(
                f"expected --set {name}=VALUE with a value as in JSON, such as 0.5, true or "
                f"[1, 2], got {value!r}"
            ) from None
    return settings


def shares_of(text: str | None) -> list[float] | Literal["auto"] | None:
    """Return the shares of ``--layer-split``; a ValueError says what are none."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"expected --layer-split as numbers like 2,1,1 or as auto, got {text!r}"
        ) from None
