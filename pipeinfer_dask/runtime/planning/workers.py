"""What workers are asked before anything is loaded there, and whether their package is ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

from distributed import Client

ANSWER_TIMEOUT_S = 120.0
"""How long workers may take to tell what they have; they may import torch first."""


def ask(
    client: Client, workers: Iterable[str], question: Callable[..., Any], *given: Any
) -> dict[str, Any]:
    """Return each worker's answer. They give it from their loops, whatever they compute.

    Raises
    ------
    RuntimeError
        If a worker does not answer.
    """
    asked = sorted({*workers})
    try:
        answers: dict[str, Any] = client.run(
            question, *given, workers=asked, callback_timeout=ANSWER_TIMEOUT_S
        )
    except TimeoutError:
        raise RuntimeError(
            f"expected {', '.join(asked)} to answer within {ANSWER_TIMEOUT_S:g} s, but one does "
            "not: see whether it hangs, and restart it or leave it out"
        ) from None
    except OSError as error:  # one has died, or can't be reached
        raise RuntimeError(
            f"expected {', '.join(asked)} to answer, but one is gone: see whether it still runs, "
            f"and try again ({error})"
        ) from error
    return answers


def check_packages(client: Client, workers: Collection[str], parts: Iterable[type]) -> None:
    """Check that workers can import this package, before anything is submitted to them.

    A task of which a worker can't import a part ends that worker, and others may use it, too. Where
    versions differ, this warns.

    Parameters
    ----------
    client : Client
    workers : collection of str
    parts : iterable of type
        What the tasks are made of.

    Raises
    ------
    RuntimeError
        If a worker can't, or does not answer.
    """

    def told(names: list[tuple[str, str]]) -> tuple[str, str, str]:
        """Return version, place, and why a part can't be imported: each empty if there is none."""
        from contextlib import suppress
        from importlib import import_module
        from importlib.metadata import PackageNotFoundError, version
        from importlib.util import find_spec
        from pathlib import Path

        place = known = reason = ""
        try:
            spec = find_spec("pipeinfer_dask")
            place = str(Path(spec.origin).parent) if spec is not None and spec.origin else ""
            for module, name in names:
                getattr(import_module(module), name)
        except Exception as error:  # a module may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        with suppress(PackageNotFoundError):  # where a path leads to it, and nothing is installed
            known = version("pipeinfer-dask")
        return known, place, reason

    # It travels as its code: by its name, a worker would have to import this module for it.
    names = [(part.__module__, part.__name__) for part in parts]
    here, _, _ = told(names)
    answers: dict[str, tuple[str, str, str]] = ask(client, workers, told, names)
    remedy = f"install the same version there as here{here and f', {here}'}"
    unable = {worker: answer for worker, answer in answers.items() if answer[2]}
    if unable:
        worker, (there, place, reason) = next(iter(unable.items()))
        copy = f"{there or 'a copy'} in {place}" if place else there or "none"
        raise RuntimeError(
            f"expected workers that can import pipeinfer-dask, got {_named(worker, unable)}, with "
            f"{copy}: {reason}: {remedy}"
        )
    others = {worker: there for worker, (there, _, _) in answers.items() if there not in ("", here)}
    if here and others:
        worker, there = next(iter(others.items()))
        # Not refused: of a development version each commit has another number, an editable clone
        # goes on telling that of its installation, and most such versions do work together.
        warnings.warn(
            f"expected workers with pipeinfer-dask {here}, as here, got {_named(worker, others)}, "
            f"with {there}: should anything fail, {remedy}",
            stacklevel=4,
        )


def _named(worker: str, all_such: Collection[str]) -> str:
    more = len(all_such) - 1
    return f"worker {worker}{f' and {more} more' if more else ''}"
