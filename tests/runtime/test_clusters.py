"""Calls on a loop of another thread, and what an interrupt does to them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

import pytest

from pipeinfer_dask.runtime.clusters import LoopThread, _interrupts_held, call_on


def test_an_interrupt_waits_until_the_workers_stand() -> None:
    steps: list[str] = []

    def start() -> None:
        with _interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("workers stand")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert steps == ["workers stand"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_call_waits_until_what_it_began_is_taken_back() -> None:
    steps: list[str] = []
    begun = threading.Event()
    caller = threading.get_ident()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            steps.append("taken back")

    def interrupt() -> None:
        begun.wait()
        while sys._current_frames()[caller].f_code.co_name != "wait":
            pass  # the caller is not waiting for the result yet
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with LoopThread() as thread, pytest.raises(KeyboardInterrupt):
        call_on(thread.loop, work())
    interrupter.join()
    assert steps == ["taken back"]


def test_an_error_of_the_call_is_the_callers() -> None:
    async def work() -> None:
        raise LookupError("gone")

    with LoopThread() as thread, pytest.raises(LookupError, match="gone"):
        call_on(thread.loop, work())
