"""Feeds what atheris makes up to the decoder and to the stream's parser: run by `test_fuzz.py`."""

import sys
from contextlib import suppress
from typing import Any

import atheris

with atheris.instrument_imports(include=["pipeinfer_dask.runtime"]):
    from pipeinfer_dask.models.stage import Intake
    from pipeinfer_dask.runtime.links.framing import CHUNK, Inflow
    from pipeinfer_dask.runtime.links.reading import decode, read_header
    from pipeinfer_dask.runtime.links.wire import WireError

INTAKE = Intake(tokens=16, width=4)


def open_message(frame: Any, nbytes: int) -> Any:
    """Read a header, and then the rest."""
    return read_header(frame, nbytes, INTAKE).complete


def feed(data: bytes) -> None:
    """Raise what is not a refusal."""
    with suppress(WireError):
        decode([data[1:]] if data[:1] < b"\x80" else [data[1:-8], data[-8:]], INTAKE)
    inflow = Inflow(open_message)
    with suppress(WireError):
        while data:
            buffer = inflow.buffer()
            part = data[: min(len(buffer), 7)]
            buffer[: len(part)] = part
            inflow.filled(len(part))
            assert inflow.nbytes <= CHUNK + INTAKE.tokens * INTAKE.width * 4
            data = data[len(part) :]


atheris.Setup(sys.argv, feed)
atheris.Fuzz()
