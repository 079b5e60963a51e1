"""Each example does what it says, with the embedded pair."""

import email
import hashlib
import json
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner

import pipeinfer_dask as pi
from tests.examples.conftest import EXAMPLES, Load


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_local_prints_a_text_and_that_it_is_the_target_s_own() -> None:
    command = [sys.executable, str(EXAMPLES / "local.py"), "import "]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("import ")
    assert ran.stdout.endswith("the text is the same without guesses.\n")


def test_streaming_prints_the_prompt_and_every_piece(example: Load) -> None:
    main = example("streaming").main
    ran = CliRunner().invoke(main, ["import ", "--max-new-tokens", "8"])
    assert ran.exit_code == 0, ran.output
    pair = pi.demo_pair()
    with pi.Engine.from_pretrained(pair.target, stages=1, in_process=True) as engine:
        text = engine.generate("import ", max_new_tokens=8).text
    assert ran.output == f"import {text}\n[length]\n"
    ran = CliRunner().invoke(main, ["import ", "--seed", "1"])
    assert (ran.exit_code, "expected --temperature with --seed" in ran.output) == (2, True)


def test_asynchronous_gives_one_up_and_finishes_the_others(
    example: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    example("asynchronous").main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "first line",
        "whole text",
        "in half a second",
    ]
    assert lines[-1].endswith(("tokens, stopped", "400 tokens, length"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Some twenty kilobytes of Python, one file of which is for validation."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    module = Path(email.__file__).with_name("message.py").read_text("utf-8")
    for number in range(4):
        (folder / f"{number}.py").write_text(module[number * 4000 :][:4000], "utf-8")
    named = (f"held_out_{number}.py" for number in count())
    held_out = next(
        name for name in named if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < 2
    )
    (folder / held_out).write_text(module[16_000:20_000], "utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_pair_is_trained_that_an_engine_opens(
    example: Load, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = example("train_demo_pair")
    monkeypatch.setattr(script, "BATCH_TOKENS", 1024)
    monkeypatch.setattr(script, "MICRO_BATCH_TOKENS", 1024)
    options = {
        "output": tmp_path / "pair",
        "work": tmp_path / "work",
        "corpus": corpus,
        "threads": 1,
        "target-steps": 1,
        "draft-steps": 1,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    ran = CliRunner().invoke(script.main, given)
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "pair" / "training.json").read_text())
    shipped = json.loads((pi.demo_pair().target.parent / "training.json").read_text())
    for size in ("target_parameters", "draft_parameters"):
        assert report[size] == shipped[size]
    models = tmp_path / "pair" / "target", tmp_path / "pair" / "draft"
    with pi.Engine.from_pretrained(*models, stages=2, in_process=True) as engine:
        assert len(engine.generate("import ", max_new_tokens=4).token_ids) == 4


def test_a_corpus_that_is_too_small_is_refused_before_anything_is_trained(
    example: Load, tmp_path: Path
) -> None:
    (tmp_path / "one.py").write_text("pass\n")
    main = example("train_demo_pair").main
    ran = CliRunner().invoke(
        main, [f"--output={tmp_path}", f"--work={tmp_path}", f"--corpus={tmp_path}"]
    )
    assert ran.exit_code == 2
    assert "give a larger --corpus" in ran.output
