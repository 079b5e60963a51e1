"""What an engine is asked to open, checked as far as that needs no look at anything."""

from __future__ import annotations

import os
from collections.abc import Sized
from typing import Any

from distributed import Client

from pipeinfer_dask.models.linears import check_weights


def check_asked(
    models: tuple[object, ...],
    client: Any,
    in_process: bool,
    stages: object,
    layer_split: object,
    weights: object,
    progress: object,
) -> None:
    """Check what a user gives to `Engine.from_pretrained`, by kind.

    Raises
    ------
    ValueError
        If anything is of a wrong kind.
    """
    if client is not None and in_process:
        raise ValueError("expected a client or in_process=True, got both: leave one out")
    if client is not None and not isinstance(client, Client):
        raise ValueError(
            f"expected a distributed.Client, got {client!r}: make one with Client(...)"
        )
    if client is not None and client.asynchronous:
        raise ValueError(
            "expected a client made with asynchronous=False: this engine's calls block "
            "(its generations can be awaited all the same)"
        )
    if stages is not None and (isinstance(stages, bool) or not isinstance(stages, int)):
        raise ValueError(f"expected stages to be a whole number, got {stages!r}")
    if layer_split is not None and not isinstance(layer_split, Sized):
        raise ValueError(
            f"expected layer_split as a sequence of numbers, one a stage, got {layer_split!r}"
        )
    check_weights(weights)
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise ValueError(f"expected progress as a callable, True, False or None, got {progress!r}")
    for model in models:
        if not isinstance(model, (str, os.PathLike)):
            raise ValueError(f"expected a model's directory or hub name, got {model!r}")
