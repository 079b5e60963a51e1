"""An engine behind a web server: text as server-sent events, and a reader who leaves ends his text.

    .venv/bin/pip install -c constraints.txt '.[examples]'
    .venv/bin/uvicorn --app-dir examples web_handler:app
    curl -N 'http://localhost:8000/generate?prompt=def+main&max_new_tokens=64'

Who waits for a turn is told the place in the queue, once and whenever it changes:

    event: queued
    data: {"position": 2}

The engine is in the server's own process, or on the workers of a cluster whose scheduler
``PIPEINFER_SCHEDULER`` names. Then a whole class can share its pipeline, each from a notebook:

    PIPEINFER_SCHEDULER=tcp://10.0.0.1:8786 .venv/bin/uvicorn --app-dir examples web_handler:app

There is no authentication here: put it behind something that has it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

try:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise SystemExit(
        "this needs starlette: .venv/bin/pip install -c constraints.txt '.[examples]'"
    ) from None

from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask import hpc

MOST_TOKENS = 400
"""What one reader may ask for."""
STAGES = 2
READERS = 16
"""So many are served at once; others wait in a queue."""
GLANCE_S = 0.05
"""Who waits there is looked at so often."""


def opened(resources: ExitStack) -> pi.Engine:
    """Open the engine: on a cluster, if there is one, once it has the workers."""
    target, draft = pi.demo_pair()
    scheduler = os.environ.get("PIPEINFER_SCHEDULER")
    if scheduler is None:
        engine = pi.Engine.from_pretrained(
            target, draft, stages=STAGES, max_concurrent=READERS, in_process=True
        )
    else:
        client = resources.enter_context(Client(scheduler, set_as_default=False))
        engine = hpc.engine_from(client, target, draft, stages=STAGES, max_concurrent=READERS)
    return resources.enter_context(engine)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open the engine with the server, and close it with it."""
    resources = ExitStack()
    try:
        # Loading blocks, and the server's loop should not.
        app.state.engine = await asyncio.to_thread(opened, resources)
        yield
    finally:
        await asyncio.to_thread(resources.close)


async def generate(request: Request) -> Response:
    """Start a generation and stream it; it waits for its turn like all others."""
    asked = request.query_params
    try:
        if not (tokens := asked.get("max_new_tokens", "64")).isdecimal():
            raise ValueError(f"expected max_new_tokens to be a whole number, got {tokens!r}")
        generation = request.app.state.engine.start(
            asked.get("prompt", ""), max_new_tokens=min(MOST_TOKENS, int(tokens))
        )
    except ValueError as error:  # it says what was expected and what to do
        return JSONResponse({"error": str(error)}, status_code=400)
    # Without this, a proxy may keep the text until it is complete.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(generation), media_type="text/event-stream", headers=headers)


async def events(generation: pi.Generation) -> AsyncIterator[str]:
    """Yield its place in the queue as ``queued``, its text as ``text``, its figures as ``done``."""
    told = None
    try:
        while generation.status == "queued":
            if (position := generation.position) not in (None, told):
                told = position
                yield event("queued", {"position": position})
            await asyncio.sleep(GLANCE_S)
        async for piece in generation:
            yield event("text", {"text": piece, "origin": piece.origin})
        result = await generation
        yield event("done", {"reason": result.finish_reason, **result.metrics.to_dict()})
    except RuntimeError as error:  # the pipeline was lost, or the engine closed
        yield event("error", {"error": str(error)})
    finally:
        generation.cancel()  # the reader may have left; else it is done, and this does nothing


def event(name: str, data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


app = Starlette(routes=[Route("/generate", generate)], lifespan=lifespan)
