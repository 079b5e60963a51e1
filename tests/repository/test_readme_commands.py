"""The README's two commands are what CI runs."""

import re
import subprocess
from pathlib import Path

MARKED = re.compile(r"^<!-- command: (\w+) -->\n```bash\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def test_readme_marks_one_command_to_see_it_and_one_to_test_it(root: Path) -> None:
    readme = (root / "README.md").read_text()
    commands = dict(MARKED.findall(readme))
    assert list(commands) == ["demo", "test"]
    assert readme.count("<!-- command:") == 2
    for command in commands.values():
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints")
    assert commands["demo"].endswith(" && .venv/bin/pipeinfer demo")
    assert commands["test"].endswith(" && .venv/bin/pytest")


def test_ci_begins_with_the_commands_of_the_readme(root: Path) -> None:
    command = ["bash", str(root / ".ci" / "run"), "--dry-run"]
    dry = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert dry[:2] == list(dict(MARKED.findall((root / "README.md").read_text())).values())
    assert [line.split("/")[-1] for line in dry[3:]] == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
    ]
