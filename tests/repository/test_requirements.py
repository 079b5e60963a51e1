"""One set of dependency ranges: pyproject.toml, environment.yml and constraints.txt agree."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# conda-forge's name: ours
CONDA_NAMES = {"pytorch": "torch", "msgpack-python": "msgpack"}


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, list[Requirement]]:
    """Requirements by extra; the empty name stands for those that are always installed."""
    metadata = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = {"": metadata["dependencies"], **metadata["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


@pytest.fixture(scope="module")
def pins(root: Path) -> dict[str, Requirement]:
    lines = (root / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def test_conda_environment_has_the_ranges_of_the_project(
    root: Path, project: dict[str, list[Requirement]]
) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    listed = [Requirement(line) for line in environment["dependencies"] if isinstance(line, str)]
    conda = {CONDA_NAMES.get(item.name, item.name): item.specifier for item in listed}
    assert conda.pop("pip") == ""
    assert conda.pop("python") == ">=3.11"
    assert conda == {item.name: item.specifier for item in project[""] + project["test"]}


def test_every_dependency_is_pinned_once_within_its_range(
    project: dict[str, list[Requirement]], pins: dict[str, Requirement]
) -> None:
    for requirement in chain.from_iterable(project.values()):
        if requirement.name == "pipeinfer-dask":
            continue
        (pin,) = pins[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} is pinned to {pin}"


def test_torch_is_pinned_without_a_build_so_that_any_index_has_it(
    pins: dict[str, Requirement],
) -> None:
    assert str(pins["torch"]) == "torch==2.13.0"
    assert not [name for name in pins if name.startswith(("nvidia", "triton"))]


# How an extra is named: to whoever has a copy of the repository, or whatever is installed.
OF_A_COPY = re.compile(r"'\.\[([a-z,]+)\]'")
OF_WHAT_IS_INSTALLED = re.compile(r"pipeinfer-dask\[([a-z,]+)\]")


def test_every_extra_that_is_named_anywhere_exists(
    tracked: list[Path], project: dict[str, list[Requirement]]
) -> None:
    named = {
        (path.name, extra)
        for path in tracked
        if path.suffix in {"", ".py", ".md", ".toml", ".ipynb", ".yml", ".yaml"}
        for form in (OF_A_COPY, OF_WHAT_IS_INSTALLED)
        for found in form.findall(path.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert len(named) > 20
    assert {(name, extra) for name, extra in named if extra not in project} == set()


def test_the_package_names_extras_of_what_is_installed_and_its_pages_those_of_a_copy(
    root: Path, tracked: list[Path]
) -> None:
    installed = root / "pipeinfer_dask"
    for path in tracked:
        if path.suffix in {".py", ".md"} and root / "tests" not in path.parents:
            unfit = OF_A_COPY if installed in path.parents else OF_WHAT_IS_INSTALLED
            assert unfit.findall(path.read_text(encoding="utf-8")) == [], path
