"""Traces in files: JSON lines, a header and then an entry a line.

A file that loads is a trace, and comes back as it was: see `pipeinfer_dask.trace.entries`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Literal, TextIO

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
from pipeinfer_dask.trace.entries import checked, read_entry, written
from pipeinfer_dask.trace.record import Trace

FORMAT = "pipeinfer_dask trace"
VERSION = 1


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace.

    Raises
    ------
    ValueError
        If the path is none, or a directory's.
    OSError
        If it can't be written there.
    """
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
        "places": dict(trace.places),
    }
    with open_file(path, "w") as file:
        file.write(json.dumps(header) + "\n")
        for time, what in records:
            file.write(written(time, what) + "\n")


def load(
    path: str | os.PathLike[str],
) -> tuple[int, list[tuple[float, Event | Command]], dict[int, str], list[str], dict[str, str]]:
    """Return a trace's fields, in order.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the path is none, or a directory's; if the file holds no trace, a damaged one, or one
        of a later version.
    """
    with open_file(path, "r") as file:
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
            stages = checked(int, header["stages"])
            if stages < 1:
                raise ValueError(f"{stages} stages")
            texts = {int(token): checked(str, text) for token, text in header["texts"].items()}
            pieces = [checked(str, piece) for piece in checked(list, header["pieces"])]
            given = checked(dict, header.get("places", {}))  # which older files lack
            places = {checked(str, node): checked(str, place) for node, place in given.items()}
            records: list[tuple[float, Event | Command]] = []
            for text in file:
                lines += 1
                records.append(read_entry(text))
            if len(records) != header["records"]:
                raise ValueError(f"{len(records)} entries instead of {header['records']!r}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged at line {lines} ({error}): save the trace again"
            ) from error
    return stages, records, texts, pieces, places


@contextmanager
def open_file(path: object, mode: Literal["r", "w"]) -> Iterator[TextIO]:
    """Open a file of ASCII for a while, or say in a line what the path should have been.

    What is written is there when it is whole: until then, and after an error, an older file of
    that name stays as it was.

    Raises
    ------
    ValueError
        If the path is none, or a directory's.
    OSError
        If there is no such file or directory, or it may not be opened, or takes no more.
    """
    file = _file(path)
    try:
        with _replacing(file) if mode == "w" else file.open(encoding="ascii") as opened:
            yield opened
    except FileNotFoundError:
        lack = f"file {file}: name one" if mode == "r" else f"directory {file.parent}: make it"
        raise FileNotFoundError(
            f"expected the path of a file, but there is no {lack}, or look for a slip"
        ) from None
    except OSError as error:
        what = "read" if mode == "r" else "write"
        raise type(error)(
            f"expected a file that you may {what}, got {file} ({error.strerror}): name another one"
        ) from error


@contextmanager
def _replacing(file: Path) -> Iterator[TextIO]:
    """Write beside a file, and put that in its place."""
    if file.exists() and not file.is_file():  # a pipe, a device
        with file.open("w", encoding="ascii") as opened:
            yield opened
        return
    file = file.resolve()  # a link stays one
    if file.exists():
        file.open("ab").close()  # or one would be replaced that may not be written
    part = file.with_name(f".{token_hex(8)}.part")
    try:
        with part.open("x", encoding="ascii") as opened:
            yield opened  # what is written last may only come to the disk when it is closed
        if file.exists():
            shutil.copymode(file, part)
        part.replace(file)
    finally:
        with suppress(OSError):
            part.unlink()


def _file(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"expected the path of a file, got {path!r}")
    if (file := Path(path)).is_dir():
        raise ValueError(f"expected the path of a file, got the directory {file}: name one in it")
    return file


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
