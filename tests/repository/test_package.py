"""What the package shows of itself: public names, version, types, and its commands."""

import importlib.metadata
import re
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
    with pytest.raises(AttributeError, match="module 'pipeinfer_dask' has no attribute 'Enginee'"):
        getattr(pipeinfer_dask, "Enginee")  # noqa: B009


def test_the_version_stands_in_the_changelog_and_the_citation(root: Path) -> None:
    version = pipeinfer_dask.__version__
    assert re.search(rf"^## \[?{re.escape(version)}\b", (root / "CHANGELOG.md").read_text(), re.M)
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()


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
