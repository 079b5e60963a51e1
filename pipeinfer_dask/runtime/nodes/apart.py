"""Moves a fork server, and so all workers forked from it, out of the terminal's process group.

A terminal sends Ctrl-C to all processes of the foreground group. Workers that got it too
would die with tracebacks before the engine could cancel what they do. Importing this
module does the move, because that is all that a fork server does of ours; anywhere else
it does nothing.

Besides, workers that are killed are to leave no semaphores behind.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

from tqdm import tqdm

if any("multiprocessing.forkserver" in argument for argument in sys.orig_argv):
    with suppress(OSError):  # a session's leader has a group of its own already
        os.setpgid(0, 0)
    tqdm.set_lock(threading.RLock())  # by default a semaphore of the system's, too
