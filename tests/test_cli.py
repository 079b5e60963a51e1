"""The commands: what they print, and how they end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click
import dask
import pytest
from click.testing import CliRunner, Result
from distributed import Client

import pipeinfer_dask as pi
from pipeinfer_dask.cli import main
from pipeinfer_dask.cli.values import settings_of
from tests.clusters import local_cluster
from tests.tiny import make_tiny

METRICS = {
    "ttft_s",
    "itl_s",
    "tokens_per_s",
    "generated_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "acceptance_rate",
    "runs",
    "runs_cancelled",
    "stage_utilization",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("pair") / "target", "llama", layers=3, seed=0))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("pair") / "draft", "llama", layers=1, seed=1))


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=text)


def generate(*arguments: str, text: str | None = None) -> Result:
    return run("generate", "--in-process", "--max-new-tokens", "20", *arguments, text=text)


def last_object(output: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(output.splitlines()[-1])
    return parsed


@pytest.fixture(scope="module")
def expected(target: str) -> pi.Result:
    with pi.Engine.from_pretrained(target, in_process=True) as engine:
        return engine.generate("def main", max_new_tokens=20)


@pytest.mark.parametrize("command", [[], ["demo"], ["generate"], ["simulate"], ["bench"]])
def test_help_is_no_error(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "Usage: pipeinfer" in result.stdout


# --- what is printed ----------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer"])
def test_the_last_line_of_json_holds_text_tokens_and_metrics(
    target: str, draft: str, expected: pi.Result, strategy: str
) -> None:
    ran = generate(
        "def main", "--target", target, "--draft", draft, "--strategy", strategy, "--json"
    )
    assert ran.exit_code == 0, ran.stderr
    (result,) = last_object(ran.stdout)["results"]
    assert result["strategy"] == strategy
    assert result["token_ids"] == expected.token_ids
    assert result["text"] == expected.text
    assert result["metrics"].keys() >= METRICS
    assert result["metrics"]["generated_tokens"] == 20
    assert len(result["metrics"]["stage_utilization"]) == 3


def test_json_alone_is_on_stdout(target: str, expected: pi.Result) -> None:
    ran = generate("def main", "--target", target, "--json")
    assert len(ran.stdout.splitlines()) == 1
    assert "iterative" in ran.stderr


def test_without_json_a_table_follows_the_text(target: str) -> None:
    ran = generate("def main", "--target", target, "--layer-split", "auto")
    assert ran.exit_code == 0, ran.stderr
    assert ran.stderr == ""
    assert "def main" in ran.stdout
    assert {"strategy", "tokens/s", "TTFT", "accepted"} <= set(ran.stdout.split())


def test_a_prompt_can_be_piped_in(target: str, expected: pi.Result) -> None:
    ran = generate("-", "--target", target, "--json", text="def main")
    (result,) = last_object(ran.stdout)["results"]
    assert result["token_ids"] == expected.token_ids


def test_stages_shares_and_knobs_are_handed_on(target: str, draft: str) -> None:
    ran = generate(
        *("x", "--target", target, "--draft", draft, "--json", "--layer-split", "2,1"),
        *("--strategy", "pipeinfer", "--set", "micro_batch=2", "--set", "cancellation=false"),
    )
    assert ran.exit_code == 0, ran.stderr
    (result,) = last_object(ran.stdout)["results"]
    assert len(result["metrics"]["stage_utilization"]) == 2
    assert result["metrics"]["runs_cancelled"] == 0


def test_a_text_is_sampled_as_the_options_say_and_the_seed_is_told(target: str, draft: str) -> None:
    models = ("--target", target, "--draft", draft, "--json")
    how = ("--temperature", "0.9", "--top-k", "40", "--set", "no_repeat_ngram_size=3")
    ran = generate("def main", *models, *how, "--logprobs", "1")
    assert ran.exit_code == 0, ran.stderr
    (result,) = last_object(ran.stdout)["results"]
    same = ("--strategy", "iterative", "--seed", str(result["seed"]))
    (again,) = last_object(generate("def main", *models, *how, *same).stdout)["results"]
    assert again["token_ids"] == result["token_ids"]
    assert (again["seed"], again["logprobs"]) == (result["seed"], None)
    assert len(result["logprobs"]) == len(result["token_ids"])
    assert result["finish_reason"] == "length"


def test_a_text_can_be_stopped_at_a_string(target: str, expected: pi.Result) -> None:
    ran = generate("def main", "--target", target, "--json", "--stop", expected.text[4:6])
    (result,) = last_object(ran.stdout)["results"]
    assert result["finish_reason"] == "stop_string"
    assert expected.text.startswith(result["text"])


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    with (
        local_cluster(n_workers=2, protocol="tcp") as cluster,
        Client(cluster, set_as_default=False),
    ):
        yield cluster.scheduler_address


def test_a_draft_can_be_looked_up_instead_of_modelled(target: str, expected: pi.Result) -> None:
    ran = generate("def main", "--target", target, "--draft", "ngram", "--json")
    (row,) = last_object(ran.stdout)["results"]
    assert row["strategy"] == "adaptive"
    assert row["token_ids"] == expected.token_ids


@pytest.mark.cluster
@pytest.mark.parametrize("head", ["client", "worker"])
def test_a_cluster_that_runs_already_can_be_used(
    target: str, draft: str, expected: pi.Result, scheduler: str, head: str
) -> None:
    arguments = ["generate", "def main", "--max-new-tokens", "20", "--target", target, "--json"]
    ran = run(*arguments, "--draft", draft, "--scheduler", scheduler, "--head", head)
    assert ran.exit_code == 0, ran.stderr
    (result,) = last_object(ran.stdout)["results"]
    assert result["token_ids"] == expected.token_ids
    assert len(result["metrics"]["stage_utilization"]) == 1  # the other worker holds the draft


# --- mistakes -----------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown command": (["dmeo"], "No such command 'dmeo'"),
    "unknown option": (["generate", "x", "--speed", "9"], "No such option '--speed'"),
    "no prompt": (["generate"], "Missing argument 'PROMPT'"),
    "empty prompt": (
        ["generate", "", "--target", "{target}"],
        "a prompt of at least one token, got an empty one",
    ),
    "draft alone": (
        ["generate", "x", "--draft", "ngrm"],
        "--target or --draft ngram, got --draft ngrm",
    ),
    "no such model": (["generate", "x", "--target", "/none/such"], "there is no directory"),
    "no model": (["generate", "x", "--target", "/usr"], "/usr is no model"),
    "a file": (["generate", "x", "--target", "{target}/config.json"], "is a file"),
    "unknown strategy": (
        ["generate", "x", "--target", "{target}", "--strategy", "magic"],
        "unknown strategy 'magic': choose one of iterative, speculative, pipeinfer",
    ),
    "no draft": (
        ["generate", "x", "--target", "{target}", "--strategy", "pipeinfer"],
        "needs a draft model",
    ),
    "unknown knob": (
        ["generate", "x", "--target", "{target}", "--set", "k=2"],
        "'iterative' has no knob 'k'",
    ),
    "a knob that is an argument": (
        ["generate", "x", "--target", "{target}", "--set", "strategy=2"],
        "or a knob of a strategy",
    ),
    "no temperature": (
        ["generate", "x", "--target", "{target}", "--temperature", "-1"],
        "expected temperature as 0, which is greedy, or from 1e-6 to 1e6, got -1.0",
    ),
    "beams": (
        ["generate", "x", "--target", "{target}", "--set", "num_beams=2"],
        "num_beams=2 is not supported",
    ),
    "knob without value": (
        ["generate", "x", "--target", "{target}", "--set", "k"],
        "expected --set NAME=VALUE, got 'k'",
    ),
    "knob of text": (
        ["generate", "x", "--target", "{target}", "--draft", "{draft}", "--set", "split=wide"],
        "expected --set split=VALUE with a value as in JSON, such as 0.5, true or [1, 2], got "
        "'wide'",
    ),
    "too many stages": (
        ["generate", "x", "--target", "{target}", "--stages", "4"],
        "4 stages need at least 4 layers, but the model has 3",
    ),
    "negative stages": (
        ["generate", "x", "--target", "{target}", "--stages", "-1"],
        "Invalid value for '--stages': -1 is not in the range x>=1",
    ),
    "stages of text": (["generate", "x", "--stages", "two"], "'two' is not a valid integer"),
    "negative share": (
        ["generate", "x", "--target", "{target}", "--layer-split", "2,-1"],
        "expected finite weights above 0 for the layer split, got -1",
    ),
    "weights of a kind that there is not": (
        ["generate", "x", "--target", "{target}", "--weights", "int8"],
        "expected weights to be one of 'auto', 'fp16', 'fp32', got 'int8'",
    ),
    "share of text": (
        ["generate", "x", "--target", "{target}", "--layer-split", "2,a"],
        "expected --layer-split as numbers like 2,1,1 or as auto, got '2,a'",
    ),
    "shares for other stages": (
        ["generate", "x", "--target", "{target}", "--stages", "3", "--layer-split", "2,1"],
        "one weight for each of the 3 stages",
    ),
    "no new tokens": (
        ["generate", "x", "--target", "{target}", "--max-new-tokens", "0"],
        "Invalid value for '--max-new-tokens': 0 is not in the range x>=1",
    ),
    "fewer than none": (
        ["generate", "x", "--target", "{target}", "--max-new-tokens", "-3"],
        "Invalid value for '--max-new-tokens': -3 is not in",
    ),
    "longer than the context": (
        ["generate", "x", "--target", "{target}", "--max-new-tokens", "512"],
        "context of 512, got 1 + 512",
    ),
    "a generation of nothing": (
        ["generate", "x", "--target", "{target}", "--max-new-tokens", "many"],
        "'many' is not a valid integer",
    ),
    "an empty stop string": (
        ["generate", "x", "--target", "{target}", "--stop", ""],
        "expected stop_strings as texts that are not empty, got ''",
    ),
    "a seed of text": (
        ["generate", "x", "--target", "{target}", "--seed", "lucky"],
        "'lucky' is not a valid integer",
    ),
    "nothing to keep": (
        ["generate", "x", "--target", "{target}", "--top-p", "0"],
        "expected top_p above 0 and up to 1, got 0.0",
    ),
    "a device that there is not": (
        ["generate", "x", "--target", "{target}", "--devices", "tpu"],
        "'tpu'",
    ),
    "in process on a cluster": (
        ["generate", "x", "--in-process", "--scheduler", "tcp://h:1"],
        "expected --in-process or --scheduler, got both",
    ),
    "more stages than memory": (
        ["generate", "x", "--target", "{target}", "--in-process", "--stages", "99999999999999"],
        "the model has 3: use at most 3 stages",
    ),
    "a seed below 0": (
        ["generate", "x", "--seed", "-1"],
        "Invalid value for '--seed': -1 is not in the range 0<=x<=9223372036854775807",
    ),
    "a setting without a name": (
        ["generate", "x", "--set", "=1"],
        "expected --set NAME=VALUE, got '=1'",
    ),
    "a setting given in two ways": (
        ["generate", "x", "--temperature", "0.9", "--set", "temperature=0.5"],
        "expected temperature once, got it as an option and by --set: leave one out",
    ),
    "a setting given twice": (
        ["generate", "x", "--set", "k=1", "--set", "k=2"],
        "expected --set k=... once, got it twice: leave one out",
    ),
    "log-probabilities that nothing shows": (
        ["generate", "x", "--logprobs", "3"],
        "expected --logprobs along with --json, which shows them: add --json",
    ),
    "more log-probabilities than tokens": (
        ["generate", "x", "--target", "{target}", "--json", "--logprobs", "99999999"],
        "expected logprobs from 0 to 288, the tokens that there are, got 99999999",
    ),
    "a dial beyond all": (
        ["bench", "compute", "--dial", "500"],
        "Invalid value for '--dial': 500 is not in the range 0<=x<=100",
    ),
    "unknown suite": (["bench", "speed"], "'speed' is not one of"),
    "a head elsewhere in process": (
        ["generate", "x", "--target", "{target}", "--in-process", "--head", "worker"],
        "expected --in-process or --head, got both: leave one out",
    ),
    "a head of no such worker": (
        ["generate", "x", "--target", "{target}", "--head", "tcp://127.0.0.1:1"],
        "expected head as 'client' or 'worker' where the engine brings its own workers",
    ),
    "scheduler without port": (
        ["generate", "x", "--target", "{target}", "--scheduler", "somewhere"],
        "expected --scheduler as an address like tcp://host:8786, got 'somewhere': missing port",
    ),
    "scheduler without a name": (
        ["generate", "x", "--target", "{target}", "--scheduler", ""],
        "expected --scheduler as an address like tcp://host:8786, got ''",
    ),
    "scheduler with TLS, and no certificates": (
        ["generate", "x", "--target", "{target}", "--scheduler", "tls://127.0.0.1:1"],
        "expected certificates of Dask's for tls://127.0.0.1:1",
    ),
    "scheduler by other means": (
        ["generate", "x", "--target", "{target}", "--scheduler", "pigeon://host:8786"],
        "expected --scheduler as an address like tcp://host:8786, got 'pigeon://host:8786'",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(
    target: str, draft: str, arguments: list[str], message: str
) -> None:
    ran = run(*(argument.format(target=target, draft=draft) for argument in arguments))
    assert ran.exit_code == 2, ran.output
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_mistakes_that_need_no_model_are_told_before_torch_is_imported() -> None:
    script = """
import sys
from click.testing import CliRunner
from pipeinfer_dask.cli import main
for mistake in (
    ["generate", ""],
    ["generate", "x", "--max-new-tokens", "0"],
    ["generate", "x", "--layer-split", "1,2,x"],
    ["generate", "x", "--strategy", "y"],
    ["demo", "--strategy", "y"],
    ["demo", "--prompt", ""],
    ["simulate", "--max-new-tokens", "1000000000"],
):
    assert CliRunner().invoke(main, mistake).exit_code == 2, mistake
print("torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr


@pytest.mark.cluster
def test_too_few_workers_are_a_mistake(target: str, draft: str, scheduler: str) -> None:
    ran = run(
        *("generate", "x", "--target", target, "--draft", draft),
        *("--scheduler", scheduler, "--stages", "3"),
    )
    assert ran.exit_code == 2
    (line,) = ran.stderr.splitlines()
    assert "expected a worker for each of 3 stages, found 2" in line


def test_a_scheduler_that_does_not_answer_is_a_mistake(target: str) -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "100ms"}):
        ran = run("generate", "x", "--target", target, "--scheduler", "tcp://127.0.0.1:1")
    assert ran.exit_code == 2
    assert "address of a running Dask scheduler, such as tcp://host:8786, got" in ran.stderr


def test_what_takes_connections_and_says_nothing_is_no_scheduler(target: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        dask.config.set({"distributed.comm.timeouts.connect": "100ms"}),
    ):
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        ran = run("generate", "x", "--target", target, "--scheduler", address)
    assert ran.exit_code == 2
    (line,) = ran.stderr.splitlines()
    assert line.endswith(
        f"got {address!r}, where none answers within 0.1 s: it says nothing for 0.1 s"
    )


def test_mistakes_read_the_same_where_dask_mounts_the_commands(target: str) -> None:
    outer = click.Group("dask", commands={"pipeinfer": main})
    ran = CliRunner().invoke(outer, ["pipeinfer", "generate", "", "--target", target])
    assert ran.exit_code == 2
    assert ran.stderr == "Error: expected a prompt of at least one token, got an empty one\n"


def test_without_arguments_the_commands_are_listed() -> None:
    assert {"demo", "generate", "simulate", "bench"} <= set(run().output.split())
    assert {"demo", "generate", "simulate", "bench"} <= set(run("--help").stdout.split())


def pipeinfer(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does: in a process of its own."""
    command = "from pipeinfer_dask.cli import main; main(prog_name='pipeinfer')"
    return subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["generate", "x", "--target", "/none/such"],
            "Error: there is no directory /none/such: give a model's directory or its name on "
            "the hub\n",
        ),
        (
            ["generate", "x", "--target", "{target}", "--stages", "9"],
            "Error: 9 stages need at least 9 layers, but the model has 3: use at most 3 stages\n",
        ),
        (
            ["generate", "--quickly"],
            "Error: No such option '--quickly'. (see `pipeinfer generate --help`)\n",
        ),
    ],
)
def test_a_user_sees_one_line_and_no_traceback(
    target: str, arguments: list[str], line: str
) -> None:
    ran = pipeinfer(*(argument.format(target=target) for argument in arguments))
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", line)


# --- virtual time ------------------------------------------------------------------------------


def test_simulate_shows_every_strategy_its_settings_and_a_picture() -> None:
    ran = run("simulate", "--stages", "3", "--max-new-tokens", "30")
    assert ran.exit_code == 0, ran.output
    for expected in (
        "iterative",
        "speculative k=4",
        "is the fastest here",
        "pipeinfer",
        "adaptive",
        "stage 2 ",
    ):
        assert expected in ran.output
    assert "virtual time" in ran.output


def test_simulate_without_a_picture_is_a_table() -> None:
    ran = run("simulate", "--no-timeline", "--strategy", "iterative", "--max-new-tokens", "5")
    assert ran.exit_code == 0, ran.output
    assert "stage 0" not in ran.output
    assert "speculative" not in ran.output


def test_simulate_gives_json_as_the_other_commands_do() -> None:
    ran = run("simulate", "--json", "--max-new-tokens", "10", "--seed", "3")
    assert ran.exit_code == 0, ran.output
    results = json.loads(ran.stdout)["results"]
    assert [result["strategy"] for result in results] == [
        "iterative",
        "speculative",
        "speculative",
        "pipeinfer",
        "adaptive",
    ]
    assert len({tuple(result["token_ids"]) for result in results}) == 1
    assert {"ttft_s", "itl_s", "itl_p95_s", "tokens_per_s"} <= set(results[0]["metrics"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--stages", "0"],
            "Error: Invalid value for '--stages': 0 is not in the range 1<=x",
        ),
        (["--stages", "100000"], "Error: Invalid value for '--stages': 100000 is not in the range"),
        (["--stage-ms", "1e300"], "Error: expected --stage-ms from 1e-6 to 1e9, got 1e+300"),
        (["--acceptance", "2"], "Error: expected an acceptance from 0 to 1, got 2.0"),
        (["--stage-ms", "-1"], "Error: expected --stage-ms from 1e-6 to 1e9, got -1"),
        (["--hop-cost", "nan"], "Error: expected hop_cost as a share of at least 0, got nan"),
        (["--strategy", "fast"], "Error: unknown strategy 'fast'"),
        (["--max-new-tokens", "0"], "Error: Invalid value for '--max-new-tokens': 0 is"),
        (["--seed", "x"], "Error: Invalid value for '--seed'"),
    ],
)
def test_what_can_not_be_simulated_is_a_mistake(arguments: list[str], message: str) -> None:
    ran = run("simulate", *arguments)
    assert ran.exit_code == 2
    assert ran.stderr.startswith(message)
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


# --- the demo --------------------------------------------------------------------------------


@pytest.mark.cluster
def test_the_demo_shows_that_all_strategies_generate_the_same() -> None:
    ran = pipeinfer("demo", "--json", "--max-new-tokens", "24")
    assert ran.returncode == 0, ran.stderr
    results = last_object(ran.stdout)["results"]
    strategies = ["iterative", "speculative", "pipeinfer", "adaptive"]
    assert [result["strategy"] for result in results] == strategies
    first, *others = results
    assert len(first["token_ids"]) == 24
    for result in results:
        assert result["metrics"].keys() >= METRICS
        assert len(result["metrics"]["stage_utilization"]) == 3
    for other in others:
        assert other["token_ids"] == first["token_ids"]
        assert other["text"] == first["text"]
        assert other["metrics"]["drafted_tokens"] > 0
    shown = " ".join(ran.stderr.split())
    assert "drafted and accepted" not in shown  # nothing is marked where there are no colours
    assert "All 4 outputs are identical, token for token." in shown
    assert "These workers share one machine's cores" in shown
    assert "Traceback" not in shown and "Warning" not in shown
    # Each was drawn, without colours, for this is no terminal.
    lines = ran.stderr.splitlines()
    for row in ("drafter ", "stage 0 ", "stage 2 ", "cancels "):
        assert sum(line.startswith(row) for line in lines) == 4
    assert max(map(len, lines)) <= 80 and "\x1b" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "magic"], "unknown strategy 'magic'"),
        (["--prompt", ""], "a prompt of at least one token, got an empty one"),
        (["--max-new-tokens", "0"], "'--max-new-tokens': 0 is not in the range x>=1"),
        (["--max-new-tokens", "100000"], "shorten the prompt or ask for fewer tokens"),
        (["--stages", "100"], "100 stages need at least 100 layers"),
    ],
)
def test_mistakes_with_the_demo_are_told_before_its_cluster_starts(
    arguments: list[str], message: str
) -> None:
    ran = run("demo", *arguments)
    assert ran.exit_code == 2, ran.output
    (line,) = ran.stderr.splitlines()
    assert message in line


def test_texts_that_are_set_keep_their_capitals() -> None:
    options = ('stop_strings=["RETURN"]', "cancellation=True", "k=2")
    assert settings_of(options) == {"stop_strings": ["RETURN"], "cancellation": True, "k": 2}


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "pipeinfer_dask", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("Usage: pipeinfer ")
