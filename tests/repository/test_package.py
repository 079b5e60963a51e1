"""What the package shows of itself: public names, version, types, and its commands."""

import importlib.metadata
import re
import subprocess
import tomllib
from importlib.resources import files
from pathlib import Path

import click
import pytest

import pipeinfer_dask

# Public registries by their hosts' parts, so that this file does not name them either.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("anaconda", "org"),
        ("download", "pytorch", "org"),
        ("unpkg", "com"),
        ("jsdelivr", "net"),
    )
]


@pytest.mark.parametrize("name", pipeinfer_dask.__all__)
def test_every_public_name_is_found_where_it_is_used_first(name: str) -> None:
    assert name in dir(pipeinfer_dask)
    assert getattr(pipeinfer_dask, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(
        AttributeError, match="module 'pipeinfer_dask' has no attribute 'Enginee': did you"
    ):
        getattr(pipeinfer_dask, "Enginee")  # noqa: B009
    with pytest.raises(AttributeError, match=r"module 'pipeinfer_dask' has no attribute 'torch'$"):
        getattr(pipeinfer_dask, "torch")  # noqa: B009


def test_the_version_is_that_of_the_installed_distribution() -> None:
    assert pipeinfer_dask.__version__ == importlib.metadata.version("pipeinfer-dask")


def released(root: Path) -> list[str]:
    """Return the versions in the changelog, newest first."""
    return re.findall(r"^## (\d\S*) \(", (root / "CHANGELOG.md").read_text(), re.M)


def test_every_tag_of_a_version_stands_in_the_changelog(root: Path) -> None:
    command = ["git", "-c", f"safe.directory={root}", "tag", "--list", "v*"]
    tags = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert {tag.removeprefix("v") for tag in tags.split()} <= set(released(root))


def test_the_citation_names_the_newest_release_if_there_is_one(root: Path) -> None:
    cited = re.findall(r"^version: (\S+)$", (root / "CITATION.cff").read_text(), re.M)
    assert cited == released(root)[:1]


def test_each_change_is_told_in_one_file_of_a_known_kind(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["towncrier"]
    kinds = {kind["directory"] for kind in project["type"]}
    # A release that has collected all of them leaves no folder.
    for path in (root / project["directory"]).glob("*"):
        name, kind, ending = path.name.rsplit(".", 2)
        assert name.startswith("+")
        assert (kind in kinds, ending) == (True, "md"), path.name
        assert path.read_text().strip()


def test_the_package_is_marked_as_typed() -> None:
    assert files(pipeinfer_dask).joinpath("py.typed").is_file()


@pytest.mark.parametrize("group", ["console_scripts", "dask_cli"])
def test_one_click_group_serves_both_command_lines(group: str) -> None:
    (entry,) = importlib.metadata.entry_points(group=group, name="pipeinfer")
    command = entry.load()
    assert isinstance(command, click.Group)
    # dask files a command under the command's own name
    assert command.name == "pipeinfer"


def test_no_file_names_a_package_registry(tracked: list[Path]) -> None:
    named = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        named += [f"{path.name}: {host}" for host in REGISTRIES if host in text]
    assert named == []
