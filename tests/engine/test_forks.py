"""A process that is forked beside an open engine leaves it to its parent, and is told so."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.engine.pairs import PROMPT, Pair

PROGRAM = """
import asyncio, json, multiprocessing, os, sys
import pipeinfer_dask as pi

async def awaited(generation):
    return await generation

def told(call):
    try:
        print(f"answered: {call()}", flush=True)
    except RuntimeError as error:
        print(f"{type(error).__name__}: {error}", flush=True)

target, draft, prompt, options = map(json.loads, sys.argv[1:])
with pi.Engine.from_pretrained(target, draft, stages=2, progress=False, **options) as engine:
    over = engine.generate(prompt, max_new_tokens=5)
    chat = engine.chat(template="plain")
    run = engine.start(prompt, max_new_tokens=200)
    next(iter(run))

    if not (asking := os.fork()):
        told(lambda: engine.generate(prompt))
        told(lambda: chat.send("def"))
        told(engine.chat)
        told(engine.measure_costs)
        told(engine.dashboard)
        told(run.result)
        told(lambda: list(run))
        told(lambda: asyncio.run(awaited(run)))
        run.cancel()
        chat.close()
        engine.close()
        sys.exit(3)
    if not (leaving := os.fork()):
        sys.exit(4)
    strange = multiprocessing.get_context("fork").Process(target=int)
    strange.start()
    strange.join()
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (asking, leaving)]
    result = run.result()
    print(os.getpid(), *ends, strange.exitcode, result.metrics.losses, result.token_ids[-1])
    assert engine.generate(prompt, max_new_tokens=5).token_ids == over.token_ids
"""
"""Forks while a text is under way: a child that asks, one that ends, and multiprocessing's."""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"in_process": True}, id="in process"),
        pytest.param({}, id="on workers", marks=pytest.mark.cluster),
        pytest.param({"head": "worker"}, id="head on a worker", marks=pytest.mark.cluster),
    ],
)
@pytest.mark.timeout(180)
def test_forked_processes_are_refused_the_engine_and_end_without_a_trace_in_it(
    pair: Pair, options: dict[str, Any]
) -> None:
    arguments = map(json.dumps, [str(pair.target), str(pair.draft), PROMPT, options])
    # Newer Pythons warn of any fork beside threads.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    *told, last = ended.stdout.splitlines()
    parent, *ends = last.split()
    why = (
        f"expected an engine of this process, got one that process {parent} opened before it "
        "forked: open one here"
    )
    assert told == [f"EngineClosedError: {why}"] * 5 + [f"GenerationInterrupted: {why}"] * 3
    assert ends == ["3", "4", "0", "0", str(pair.greedy[199])]
    assert (ended.returncode, ended.stderr) == (0, "")
