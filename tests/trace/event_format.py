"""What Chrome's trace event format asks of a file, in the form that is an object of JSON.

Events may come in any order, and viewers drop what is wrong without a word; so all is held
against the format's own text, and no more is allowed than what is written here.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

Entry = dict[str, Any]

COMMON = {"ph", "name", "pid", "tid"}
FIELDS = {
    "X": {"ts", "dur", "cat", "args"},
    "s": {"ts", "id", "cat"},
    "f": {"ts", "id", "cat", "bp"},
    "i": {"ts", "s", "args"},
    "C": {"ts", "args"},
    "M": {"args"},
}
"""For each phase its fields, besides those that all have."""
METADATA = {
    "process_name": ("name", str),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


def violations(text: str) -> list[str]:
    """Return what is wrong with a file, a sentence each."""

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    document = json.loads(text, parse_constant=constant)
    events = document["traceEvents"]
    wrong = [] if document.get("displayTimeUnit") in ("ms", "ns") else ["no unit of time"]
    broken = {number: list(_event(event)) for number, event in enumerate(events)}
    wrong += [f"event {number}: {what}" for number, each in broken.items() for what in each]
    if not wrong:  # what follows needs whole events
        wrong += [*_names(events), *_slices(events), *_flows(events)]
    return wrong


def number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _event(event: Entry) -> Iterator[str]:
    phase = event.get("ph")
    if phase not in FIELDS:
        yield f"there is no phase {phase!r}"
        return
    if event.keys() != COMMON | FIELDS[phase]:
        yield f"its fields are {', '.join(event)}"
        return
    if type(event["name"]) is not str or not event["name"]:
        yield "no name"
    if type(event["pid"]) is not int or type(event["tid"]) is not int:
        yield "numbers of process and thread are whole ones"
    for name in ("ts", "dur"):
        if name in event and not (number(event[name]) and event[name] >= 0):
            yield f"{name} is {event[name]!r}"
    if not isinstance(event.get("args", {}), dict):
        yield "arguments have names"
    if phase == "i" and event["s"] not in ("g", "p", "t"):
        yield f"a mark of {event['s']!r}"
    if phase == "f" and event["bp"] != "e":
        yield "an arrow ends at whatever slice comes next"
    if phase in "sf" and type(event["id"]) is not int:
        yield "an arrow's number is no whole one"
    if phase == "C" and not all(map(number, event["args"].values())):
        yield "counts are numbers"
    if phase == "M":
        key, kind = METADATA.get(event["name"], ("", object))
        if event["args"].keys() != {key} or type(event["args"][key]) is not kind:
            yield f"metadata {event['name']} of {event['args']}"


def _names(events: list[Entry]) -> Iterator[str]:
    told = defaultdict[str, set[tuple[int, int]]](set)
    for event in events:
        if event["ph"] == "M":
            place = (event["pid"], 0 if event["name"] == "process_name" else event["tid"])
            if place in told[event["name"]]:
                yield f"{event['name']} is told twice of {place}"
            told[event["name"]].add(place)
    for event in events:
        place = (event["pid"], event["tid"])
        if place not in told["thread_name"]:
            yield f"thread {place} has no name"
        if (event["pid"], 0) not in told["process_name"]:
            yield f"process {event['pid']} has no name"


def _slices(events: list[Entry]) -> Iterator[str]:
    rows = defaultdict[tuple[int, int], list[tuple[int, int]]](list)
    for event in events:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append(_span(event))
    for row, spans in rows.items():
        last = 0
        for began, ended in sorted(spans):
            if began < last:  # one thing at a time, or they would be shown as nested
                yield f"slices of {row} overlap at {began} ns"
            last = max(last, ended)


def _flows(events: list[Entry]) -> Iterator[str]:
    spans = {(e["pid"], e["tid"], _ns(e["ts"])) for e in events if e["ph"] == "X" and e["dur"]}
    ends: dict[str, dict[tuple[str, str, int], Entry]] = {"s": {}, "f": {}}
    for event in events:
        if (phase := event["ph"]) in ends:
            key = (event["name"], event["cat"], event["id"])
            if key in ends[phase]:
                yield f"arrow {key} is there twice"
            ends[phase][key] = event
            if (event["pid"], event["tid"], _ns(event["ts"])) not in spans:
                yield f"arrow {key} is at no slice"
    for key in ends["s"].keys() ^ ends["f"].keys():
        yield f"arrow {key} has one end"
    for key in ends["s"].keys() & ends["f"].keys():
        if ends["s"][key]["ts"] > ends["f"][key]["ts"]:
            yield f"arrow {key} leads back in time"


def _span(event: Entry) -> tuple[int, int]:
    return _ns(event["ts"]), _ns(event["ts"]) + _ns(event["dur"])


def _ns(microseconds: float) -> int:
    return round(microseconds * 1e3)
