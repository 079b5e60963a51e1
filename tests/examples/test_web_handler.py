"""The web handler streams, refuses what can't be, and stops for readers who leave."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import pipeinfer_dask as pi
from tests.clusters import local_cluster
from tests.examples.conftest import EXAMPLES, Load

pytest.importorskip("starlette", reason="needs '.[examples]'")
pytest.importorskip("uvicorn", reason="needs '.[examples]'")
httpx = pytest.importorskip("httpx", reason="needs '.[examples]'")

Visit = Callable[[Any], Awaitable[Any]]
READER = """
import http.client, json, sys, time
from urllib.parse import urlencode
server = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=100)
server.request("GET", "/generate?" + urlencode({"prompt": sys.argv[2], "max_new_tokens": 80}))
print("asked", flush=True)
events = [json.loads(line[6:]) | {"at": time.monotonic()}
    for line in server.getresponse() if line.startswith(b"data: ")]
print(json.dumps(events))
"""
"""One of a class, who has asked before he reads."""


@pytest.fixture
def app(example: Load) -> Any:
    return example("web_handler").app


def served(app: Any, visit: Visit) -> Any:
    """Return what a visit gives while the server is up."""

    async def serve() -> Any:
        async with app.router.lifespan_context(app):
            return await visit(app)

    return asyncio.run(serve())


async def get(app: Any, **params: Any) -> Any:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="https://server") as client:
        return await client.get("/generate", params=params)


def scope(query: bytes) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "GET",
        "path": "/generate",
        "query_string": query,
        "headers": [],
    }


def test_text_comes_as_events_and_the_figures_last(app: Any) -> None:
    async def visit(app: Any) -> Any:
        reply = await get(app, prompt="def main", max_new_tokens=12)
        return reply, app.state.engine.generate("def main", max_new_tokens=12)

    reply, result = served(app, visit)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [part.split("\n") for part in reply.text.strip().split("\n\n")]
    said = [(name[7:], json.loads(data[6:])) for name, data in events]
    assert "".join(data["text"] for name, data in said if name == "text") == result.text
    assert said[-1][0] == "done"
    assert said[-1][1]["generated_tokens"] == 12


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"prompt": ""}, "expected a prompt"),
        ({"prompt": "a", "max_new_tokens": "many"}, "to be a whole number, got 'many'"),
        ({"prompt": "a", "max_new_tokens": "-1"}, "to be a whole number, got '-1'"),
        ({"prompt": "a", "max_new_tokens": "0"}, "expected max_new_tokens"),
    ],
)
def test_what_can_t_be_is_refused_with_the_reason(
    app: Any, params: dict[str, str], told: str
) -> None:
    reply = served(app, lambda app: get(app, **params))
    assert reply.status_code == 400
    assert told in reply.json()["error"]


def test_a_reader_who_leaves_ends_the_text(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[pi.Generation] = []

    async def visit(app: Any) -> pi.Result:
        engine = app.state.engine
        start = engine.start

        def noted(*args: Any, **options: Any) -> pi.Generation:
            started.append(start(*args, **options))
            return started[-1]

        monkeypatch.setattr(engine, "start", noted)
        some = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await some.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                some.set()

        await app(scope(b"prompt=def+main&max_new_tokens=400"), receive, send)
        return await started[0]

    result = served(app, visit)
    assert result.finish_reason == "stopped"
    assert 0 < len(result.token_ids) < 400


def test_who_waits_for_a_turn_is_told_the_place_in_the_queue(
    example: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = example("web_handler")
    monkeypatch.setattr(server, "READERS", 1)

    async def visit(app: Any) -> tuple[str, pi.Result]:
        engine = app.state.engine
        # One has the pipeline, and another one is the next to have it.
        before = [engine.start("import os", max_new_tokens=400) for _ in range(2)]
        read = ""

        async def receive() -> dict[str, Any]:
            return await asyncio.Future()  # he stays

        async def send(message: dict[str, Any]) -> None:
            nonlocal read
            read += message.get("body", b"").decode()
            for place, one in zip((2, 1), before, strict=True):
                if read.endswith(f'event: queued\ndata: {{"position": {place}}}\n\n'):
                    one.cancel()

        await app(scope(b"prompt=def+main&max_new_tokens=12"), receive, send)
        return read, await engine.start("def main", max_new_tokens=12)

    read, result = served(server.app, visit)
    names, data = zip(*(part.split("\n") for part in read.strip().split("\n\n")), strict=True)
    assert list(dict.fromkeys(names)) == ["event: queued", "event: text", "event: done"]
    said = [json.loads(line[6:]) for line in data]
    assert [one["position"] for one in said if "position" in one] == [2, 1]
    assert "".join(one.get("text", "") for one in said) == result.text


@pytest.mark.cluster
def test_readers_in_processes_of_their_own_share_one_engine_on_a_cluster() -> None:
    prompts = ["def main", "import os", "class Tree"]
    with (
        local_cluster(n_workers=3, protocol="tcp://") as cluster,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        # They ask before there is a server: so it has all requests at once.
        asking = [sys.executable, "-c", READER, str(listening.getsockname()[1])]
        readers = [
            subprocess.Popen([*asking, prompt], stdout=subprocess.PIPE, text=True)
            for prompt in prompts
        ]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "asked\n"
        serving = ["-m", "uvicorn", "--app-dir", str(EXAMPLES), "web_handler:app"]
        with subprocess.Popen(
            [sys.executable, *serving, "--fd", str(listening.fileno())],
            pass_fds=[listening.fileno()],
            env=os.environ | {"PIPEINFER_SCHEDULER": cluster.scheduler_address},
        ) as server:
            try:
                read = [json.loads(reader.communicate(timeout=100)[0]) for reader in readers]
                held = [key for key in cluster.scheduler.tasks if "pipeinfer" in str(key)]
            finally:
                server.terminate()
    assert len(held) == 3, "both stages and the drafter are on the cluster"
    with pi.Engine.from_pretrained(pi.demo_pair().target, in_process=True) as plain:
        for prompt, events in zip(prompts, read, strict=True):
            text = "".join(event.get("text", "") for event in events)
            assert text == plain.generate(prompt, max_new_tokens=80).text
    assert max(events[0]["at"] for events in read) < min(events[-1]["at"] for events in read)
