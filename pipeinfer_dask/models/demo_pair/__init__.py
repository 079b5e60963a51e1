"""The embedded pair: a small target and its draft, trained on Python's standard library.

Made by ``examples/train_demo_pair.py``; ``training.json`` beside this file says how.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

DEMO_PROMPT = '''\
import os
import sys


def split(path):
    """Split a pathname.

    Return a tuple (head, tail).
    """'''
"""A prompt whose greedy continuation is worth looking at."""


class DemoPair(NamedTuple):
    """Directories of the embedded models, in Hugging Face format."""

    target: Path
    draft: Path


def demo_pair() -> DemoPair:
    """Return the paths of the embedded target and draft.

    Returns
    -------
    DemoPair
        ``(target, draft)``, to hand to `Engine.from_pretrained`.
    """
    here = Path(__file__).parent
    return DemoPair(here / "target", here / "draft")
