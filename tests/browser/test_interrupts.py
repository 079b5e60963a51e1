"""Interrupting a cell of a real kernel, as the stop button of a notebook does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.browser
WAIT_S = 60.0

ENGINE = """
import threading
import pipeinfer_dask as pi
target, draft = pi.demo_pair()
engine = pi.Engine.from_pretrained(target, draft=draft, stages=2, in_process=True)
start, runs = engine.start, []

def noted(*prompt, **options):
    run = start(*prompt, **options)
    runs.append(run)
    threading.Thread(target=lambda: (next(iter(run)), print("GOING", flush=True))).start()
    return run

engine.start = noted
"""
CELLS = {
    "generate": "engine.generate('def main', max_new_tokens=480)",
    "result": "engine.start('def main', max_new_tokens=480).result()",
    "for": "for piece in engine.start('def main', max_new_tokens=480): pass",
    "await": "await engine.start('def main', max_new_tokens=480)",
    "async for": "async for piece in engine.start('def main', max_new_tokens=480): pass",
}


class Notebook:
    """A kernel and what it says."""

    def __init__(self, manager: Any, client: Any) -> None:
        self._manager = manager
        self._client = client

    def run(self, cell: str, *, interrupted: bool = False) -> str:
        """Run a cell to its end; return what it printed, or the name of its error."""
        cell_id = self._client.execute(cell)
        said = ""
        while True:
            message = self._client.get_iopub_msg(timeout=WAIT_S)
            if message["parent_header"].get("msg_id") != cell_id:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "error":
                said = content["ename"]
            elif kind == "stream" and content["name"] == "stdout":
                said += content["text"]
                if interrupted and "GOING" in content["text"]:
                    self._manager.interrupt_kernel()
            elif kind == "status" and content["execution_state"] == "idle":
                return said


@pytest.fixture(scope="module")
def notebook(sealed: None) -> Iterator[Notebook]:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel()
    notebook = Notebook(manager, client)
    try:
        assert notebook.run(ENGINE) == ""
        yield notebook
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_interrupting_a_cell_cancels_its_generation_and_the_next_is_served(
    notebook: Notebook, cell: str
) -> None:
    assert notebook.run(cell, interrupted=True) in ("KeyboardInterrupt", "CancelledError")
    ends = "print(runs[-1].result(30).finish_reason, len(runs[-1].token_ids) < 480)"
    assert notebook.run(ends) == "stopped True\n"
    served = "print(len(start('def main', max_new_tokens=9).result(30).token_ids))"
    assert notebook.run(served) == "9\n"
