"""Work of transformers without its progress bars: a worker's terminal nobody sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Show none of them meanwhile."""
    previous = logging.set_tqdm_hook(
        lambda factory, args, kwargs: factory(*args, **kwargs | {"disable": True})
    )
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)
