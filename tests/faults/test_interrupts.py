"""Ctrl-C once more, while an engine closes, hurries its end and breaks nothing."""

from __future__ import annotations

import signal

import pytest

from tests.engine.pairs import Pair
from tests.faults.test_lifecycle import PATIENCE_S, running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PROGRAM = """
import signal, sys
import psutil
import pipeinfer_dask as pi

def interrupted():
    signal.raise_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(workers, 60)
    print(len(workers), len(alive), flush=True)
    signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
with pi.Engine.from_pretrained(sys.argv[1], stages=2, progress=False) as engine:
    (forks,) = [one for one in psutil.Process().children() if "forkserver" in str(one.cmdline())]
    workers = forks.children()
    engine._resources.callback(interrupted)  # comes before all else that is closed
    run = engine.start("def", max_new_tokens=480)
    next(iter(run))
    if sys.argv[2] == "twice":
        signal.raise_signal(signal.SIGINT)
"""
"""Nothing in it ends the workers before ``interrupted`` has seen them end, but the interrupt."""


@pytest.mark.parametrize("times", ["once", "twice"])
def test_an_interrupt_while_an_engine_closes_kills_its_workers_and_is_raised_once(
    pair: Pair, times: str
) -> None:
    with running(PROGRAM, str(pair.target), times) as program:
        said, complained = program.communicate(timeout=2 * PATIENCE_S)
        assert said == "2 0\n"
        # Python ends by the signal itself, unless it forgets it in what torch does at its end.
        assert program.returncode in (-signal.SIGINT, 1)
        assert complained.count("Traceback") == 1
        assert complained.splitlines()[-1] == "KeyboardInterrupt"
