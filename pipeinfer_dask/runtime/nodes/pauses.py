"""Keeps Python's garbage collector from stopping the head.

A full collection walks every object of the process: with torch and transformers loaded
that takes a fifth of a second, in which no event is heard and no run is started.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_open = 0


@contextmanager
def short_collections() -> Iterator[None]:
    """Have collections pass over what is there now, until the last such block ends.

    What becomes garbage of it meanwhile, and lies in a cycle, is collected afterwards.
    """
    global _open
    with _lock:
        if _open == 0 and gc.get_freeze_count() > 0:
            ours = False  # whoever has frozen something does this by himself
        else:
            ours = True
            _open += 1
            if _open == 1:
                gc.freeze()
    try:
        yield
    finally:
        with _lock:
            if ours:
                _open -= 1
                if _open == 0:
                    gc.unfreeze()
