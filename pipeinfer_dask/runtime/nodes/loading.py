"""What a pipeline tells while its models load."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tqdm.auto import tqdm

from pipeinfer_dask.models.stage import CountBytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loading:
    """How far one node is with loading its part of a model.

    Attributes
    ----------
    node : str
        Its title, such as ``stage 0 (layers 0 to 9)``.
    where : str
        Its worker's address, or what stands for it.
    nbytes, total : int
        Bytes of the checkpoint that it has read, and all that it reads. Both are 0 as long as
        that is not known.
    stands : bool
        Whether the model is ready. Told once for each node, as the last of it.
    """

    node: str
    where: str
    nbytes: int
    total: int
    stands: bool


T = TypeVar("T")

HERE = "a thread of this process"
"""Where nodes are that are on no worker."""

Progress = Callable[[Loading], None]
"""Told of each step. Called on the engine's event loop: it must not wait. If it raises, the log
says so, and it is told no more."""


class Steps:
    """Tells one node's steps to whoever asked for progress, if anybody did."""

    def __init__(self, node: str, where: str, progress: Progress | None) -> None:
        self._node = node
        self._where = where
        self._progress = progress
        self._last = (0, 0)
        self._news = time.monotonic()

    @property
    def quiet(self) -> float:
        """Seconds since the node last told of anything."""
        return time.monotonic() - self._news

    def note(self) -> None:
        """Take note that the node has told of something."""
        self._news = time.monotonic()

    def read(self, nbytes: int, total: int) -> None:
        self.note()
        self._last = nbytes, total
        self._tell(stands=False)

    def stands(self) -> None:
        self._tell(stands=True)

    def counted(
        self, load: Callable[[CountBytes], T], post: Callable[..., None]
    ) -> Callable[[], T]:
        """Return what loads and tells, for a thread from which steps are posted to a loop."""

        def counted() -> T:
            model = load(partial(post, self.read))
            post(self.stands)
            return model

        return counted

    def _tell(self, *, stands: bool) -> None:
        if self._progress is not None:
            self._progress(Loading(self._node, self._where, *self._last, stands))


def in_notebook() -> bool:
    """Return whether this is the process of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _until_it_raises(progress: Progress) -> Progress:
    """Tell of steps as long as that goes well: what shows a model's loading must not end it.

    A lost node loads in mid-text, when the cell with its bar may be gone.
    """
    raised = False

    def tell(step: Loading) -> None:
        nonlocal raised
        if raised:
            return
        try:
            progress(step)
        except Exception as error:
            raised = True
            logger.warning(
                "progress is told no more, for it has raised %s: %s", type(error).__name__, error
            )

    return tell


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """Give who is to be told of the steps.

    Parameters
    ----------
    progress : callable, bool or None
        True shows one bar over all nodes, and wipes it away at the end; so does None in a
        notebook.
    """
    if callable(progress):
        yield _until_it_raises(progress)
    elif progress is False or (progress is None and not in_notebook()):
        yield None
    else:
        # Shown here, in the caller's cell or terminal, for steps come from another thread.
        with tqdm(desc="loading", unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
            latest: dict[str, Loading] = {}

            def tell(step: Loading) -> None:
                if bar.disable:  # all stood, and a lost node is made anew since
                    return
                latest[step.node] = step
                bar.total = sum(one.total for one in latest.values())
                bar.update(sum(one.nbytes for one in latest.values()) - bar.n)

            yield _until_it_raises(tell)
