"""The README's two commands are what CI runs, and its program runs too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipeinfer_dask.cli import main

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
    assert commands["test"].endswith(" && .venv/bin/pytest -n 2")


def test_ci_begins_with_the_commands_of_the_readme(root: Path) -> None:
    command = ["bash", str(root / ".ci" / "run"), "--dry-run"]
    dry = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert dry[:2] == list(dict(MARKED.findall((root / "README.md").read_text())).values())
    assert [line.split("/")[-1] for line in dry[-3:]] == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
    ]


def test_ci_runs_with_all_extras_what_is_skipped_without_one(root: Path) -> None:
    command = ["bash", str(root / ".ci" / "run"), "--dry-run"]
    dry = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, installed, after = dry.partition("pip install -c constraints.txt -e '.[dev,")
    assert installed
    skipping = [
        path.relative_to(root)
        for path in sorted((root / "tests").rglob("test_*.py"))
        if re.search(r"pytest\.importorskip\(", path.read_text(encoding="utf-8"))
    ]
    assert len(skipping) > 5
    run = {Path(word) for line in after.splitlines() if "pytest" in line for word in line.split()}
    assert [path for path in skipping if run.isdisjoint({path, *path.parents[:-2]})] == []


@pytest.mark.parametrize("workflow", ["ci.yml", "release.yml"])
def test_a_workflow_runs_the_whole_check_with_the_python_that_it_has_set_up(
    root: Path, workflow: str
) -> None:
    told = yaml.safe_load((root / ".github" / "workflows" / workflow).read_text())
    steps = [step for job in told["jobs"].values() for step in job["steps"]]
    (check,) = [place for place, step in enumerate(steps) if ".ci/run" in step.get("run", "")]
    # It installs system packages, and sudo alone would look for python3 on root's own path.
    assert steps[check]["run"] == 'sudo env "PATH=$PATH" bash .ci/run'
    before = [step.get("uses", "").partition("@")[0] for step in steps[:check]]
    assert before == ["actions/checkout", "actions/setup-python"]
    # Root's pip fills a cache of its own, and the action fails where the user's is not there.
    assert [step for step in steps[:check] if "cache" in step.get("with", {})] == []


def test_the_simulation_in_the_readme_is_what_its_command_prints(root: Path) -> None:
    readme = (root / "README.md").read_text()
    shown = re.search(
        r"^\.venv/bin/pipeinfer (simulate .*)\n```\n\n```text\n(.*?)^```$", readme, re.M | re.S
    )
    assert shown is not None
    ran = CliRunner().invoke(main, shown[1].split(), env={"COLUMNS": "80"})
    assert [line.rstrip() for line in ran.stdout.splitlines()] == shown[2].splitlines()


@pytest.mark.cluster
def test_program_in_the_readme_prints_the_same_text_at_once_and_as_it_comes(
    root: Path, tmp_path: Path
) -> None:
    programs = re.findall(r"^```python\n(.*?)^```$", (root / "README.md").read_text(), re.M | re.S)
    script = tmp_path / "program.py"
    script.write_text(programs[0])
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    text, _, rest = ran.stdout.partition("\nMetrics(")
    assert text
    assert rest.endswith(")\n" + text)


def test_each_part_of_the_package_stands_where_the_readme_says_where_things_are(root: Path) -> None:
    readme = (root / "README.md").read_text()
    listed = readme.partition("## Where things are")[2].partition("## ")[0]
    parts = [
        path.name + "/" * path.is_dir()
        for path in (root / "pipeinfer_dask").iterdir()
        if path.name[0] not in "_." and (path.is_dir() or path.suffix == ".py")
    ]
    assert [part for part in parts if f"{part}`" not in listed] == []


def test_what_the_readme_links_to_is_there_down_to_the_heading(root: Path) -> None:
    readme = root / "README.md"
    links = re.findall(r"\]\((?!https://)([^)]+)\)", readme.read_text(encoding="utf-8"))
    assert len(links) > 20
    for link in links:
        name, _, heading = link.partition("#")
        page = root / name if name else readme
        assert page.exists(), link
        if heading:
            told = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in told}
            assert heading in anchors, link
