"""Whatever the pages show as code runs: Python as it stands, and every `pipeinfer` command."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeinfer_dask.bench import SUITES
from pipeinfer_dask.cli import main
from tests.docs.blocks import PAGES, ROOT, Block, blocks

NOT_RUN = {"", "text", "markdown"}
"""What claims to be no code."""
ELSEWHERE = re.compile(
    r"(\.venv/bin/)?(python3?|pip|pytest|ruff|mypy|pre-commit|conda|git|bash|coverage|sphinx-build|towncrier)\b"
)
"""Commands that set up, test or release: `.ci/run` is made of them."""


def of(language: str) -> list[object]:
    """Return each page that has blocks of a language, with them."""
    found = [
        (page, [b for b in blocks(page) if b.language == language and not b.on_a_cluster])
        for page in PAGES
    ]
    return [
        pytest.param(page, part, id=str(page.relative_to(ROOT))) for page, part in found if part
    ]


def commands(code: str) -> list[str]:
    """Return the command lines of a shell block, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [bare for line in lines if (bare := line.split("  #")[0].strip())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_block_says_what_it_is(page: Path) -> None:
    known = {"python", "bash", *NOT_RUN}
    strange = [
        f"{page.name}:{block.line}: {block.language}"
        for block in blocks(page)
        if block.language not in known and not block.language.startswith(("{", "!"))
    ]
    assert strange == [], "fence what can't be run as text"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_for_a_cluster_is_python(page: Path) -> None:
    for block in blocks(page):
        if block.on_a_cluster:
            assert block.language == "python"
            compile("\n" * (block.line - 1) + block.code, str(page), "exec")


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("page", "part"), of("python"))
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, part: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in part:
        # Errors then name the page and the line.
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("page", "part"), of("bash"))
def test_the_commands_of_a_page_run(page: Path, part: list[Block]) -> None:
    for block in part:
        for command in commands(block.code):
            if ELSEWHERE.match(command):
                continue
            words = shlex.split(command)
            program = words[0].removeprefix(".venv/bin/")
            assert program == "pipeinfer", f"{page.name}:{block.line}: {command}"
            if words[1] == "bench":
                main.commands["bench"].make_context("bench", words[2:])  # too long to run
            else:
                ran = CliRunner().invoke(main, words[1:])
                assert ran.exit_code == 0, f"{command}: {ran.output}"


def test_each_command_that_is_named_in_passing_exists() -> None:
    told = [
        (page.name, *named)
        for page in PAGES
        for named in re.findall(
            r"`(?:\.venv/bin/|dask )?pipeinfer ([\w-]+)(?: ([\w-]+))?", page.read_text("utf-8")
        )
    ]
    assert len(told) > 20
    words = {*main.commands, "tree"}  # the last is a column of a table, with several sequences
    assert [one for one in told if one[1] not in words] == []
    assert [one for one in told if one[1] == "bench" and one[2] not in {*SUITES, ""}] == []


def test_the_page_of_the_command_line_tells_of_each_suite_of_benchmarks() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", page, re.M)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == {*SUITES}
