"""The cell magic, in a real IPython shell."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import pipeinfer_dask as pi
from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.engine import GenerationInterrupted
from pipeinfer_dask.policies import Iterative
from pipeinfer_dask.protocol.messages import Origin
from tests.engine.test_failure import break_after


@pytest.fixture(scope="module")
def engine() -> Iterator[pi.Engine]:
    target, draft = pi.demo_pair()
    with pi.Engine.from_pretrained(target, draft, stages=2, in_process=True) as engine:
        yield engine


@pytest.fixture
def shell(engine: pi.Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a shell takes its place
    shell = InteractiveShell()
    assert run(shell, "%load_ext pipeinfer_dask") == ""
    shell.user_ns["engine"] = engine
    yield shell
    shell.run_line_magic("reset", "-f")


def run(shell: Any, cell: str) -> str:
    """Run a cell, and return what it shows."""
    with capture_output() as shown:
        shell.run_cell(cell)
    assert isinstance(shown.stdout, str)
    return shown.stdout + shown.stderr


def test_a_cell_is_a_prompt(shell: Any, engine: pi.Engine) -> None:
    text = engine.generate("def main", max_new_tokens=12).text
    assert run(shell, "%%pipeinfer -n 12\ndef main\n") == text + "\n"
    assert run(shell, "%%pipeinfer engine -n 12 -s iterative\ndef main") == text + "\n"


def test_the_result_is_kept_where_it_is_asked_for(shell: Any) -> None:
    run(shell, "%%pipeinfer -n 5 --strategy speculative --out said\ndef main")
    said = shell.user_ns["said"]
    assert isinstance(said, pi.Result)
    assert (said.strategy, len(said.token_ids)) == ("speculative", 5)


def test_a_chat_goes_on_from_cell_to_cell(shell: Any, engine: pi.Engine) -> None:
    with engine.chat(template="plain") as chat, engine.chat(template="plain") as other:
        shell.user_ns["chat"] = chat
        shown = [run(shell, f"%%pipeinfer chat -n 6\n{text}") for text in ("def main", "if x")]
        said = [other.send(text, max_new_tokens=6).text for text in ("def main", "if x")]
        assert shown == [text + "\n" for text in said]
        assert len(chat.messages) == 4


def test_what_may_be_asked_is_listed(shell: Any) -> None:
    shown = run(shell, "%%pipeinfer --help\ndef")
    assert all(option in shown for option in ("engine", "--strategy", "--max-new-tokens", "--out"))
    assert "UsageError" not in shown


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("%%pipeinfer nobody\nx", "expected nobody to be an engine or a chat, got nothing"),
        ("%%pipeinfer number\nx", "expected number to be an engine or a chat, got int"),
        ("%%pipeinfer -s foolish\nx", "foolish"),
        ("%%pipeinfer -n 0\nx", "max_new_tokens"),
        ("%%pipeinfer -n many\nx", "argument --max-new-tokens/-n: invalid int value"),
        ("%%pipeinfer -o 1st\nx", "expected a name behind --out, got '1st'"),
        ("%%pipeinfer -o class\nx", "expected a name behind --out, got 'class'"),
        ("%%pipeinfer 'engine\nx", 'expected arguments as in a shell, got "\'engine"'),
        ("%%pipeinfer\n\n", "expected a prompt of at least one token, got an empty one"),
        ("%%pipeinfer -n 9999\nx", "expected prompt and new tokens to fit the model's context"),
    ],
)
def test_a_mistake_is_told_in_a_line(shell: Any, cell: str, reason: str) -> None:
    shell.user_ns["number"] = 3
    shown = run(shell, cell)
    assert shown.startswith("UsageError: ") and shown.count("\n") == 1
    assert reason in shown


def test_a_pipeline_that_is_lost_is_told_in_a_line_behind_the_text_so_far(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = pi.demo_pair()
    with pi.Engine.from_pretrained(target, stages=2, in_process=True) as engine:
        shell.user_ns["lost"] = engine
        text = engine.generate("def main", max_new_tokens=12).text
        break_after(6, monkeypatch, "run", engine.layer_ranges[-1].stop)
        so_far, told, end = run(shell, "%%pipeinfer lost -n 12 -o said\ndef main").rsplit("\n", 2)
        assert so_far and so_far != text and text.startswith(so_far)
        assert re.match(r"UsageError: .*stage 1 .*numbers ran out", told) and not end
        said = shell.user_ns["said"]  # with it the text can be gone on with
        assert isinstance(said, GenerationInterrupted) and said.partial == so_far
        again = run(shell, "%%pipeinfer lost\ndef main")
        assert re.fullmatch(r"UsageError: the pipeline is lost .*: open another one\n", again)
    closed = run(shell, "%%pipeinfer lost\ndef main")
    assert closed == "UsageError: this engine is closed: open another one\n"


def test_an_interrupted_cell_keeps_its_generation(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Event()

    def committed(self: Iterative, machine: Machine, origins: Sequence[Origin]) -> None:
        if machine.generated == 5:
            heard.set()

    def interrupt() -> None:
        heard.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Iterative, "committed", committed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(interrupt)
            shown = run(shell, "%%pipeinfer -n 400 -s iterative -o said\ndef main")
    finally:
        signal.signal(signal.SIGINT, before)
    assert "KeyboardInterrupt" in shown
    result = shell.user_ns["said"].result(60)
    assert result.finish_reason == "stopped"
    assert 5 <= len(result.token_ids) < 400


def test_one_of_several_engines_has_to_be_named(shell: Any, engine: pi.Engine) -> None:
    shell.user_ns["same"] = engine  # the same one under two names is one
    assert run(shell, "%%pipeinfer -n 3\ndef") != ""
    target, _ = pi.demo_pair()
    with pi.Engine.from_pretrained(target, stages=1, in_process=True) as other:
        shell.user_ns["other"] = other
        told = run(shell, "%%pipeinfer -n 3\ndef")
        assert "expected one engine, got engine, same, other: name it" in told
    text = engine.generate("def", max_new_tokens=3).text
    assert run(shell, "%%pipeinfer -n 3\ndef") == text + "\n"
    for name in ("same", "engine"):
        del shell.user_ns[name]
    assert "this engine is closed" in run(shell, "%%pipeinfer -n 3\ndef")
    del shell.user_ns["other"]
    assert "expected one engine, got none" in run(shell, "%%pipeinfer -n 3\ndef")
