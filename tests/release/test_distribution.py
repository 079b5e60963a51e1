"""What users install: its contents, its version, and that it works in an empty environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="needs '.[dev]'")
pytest.importorskip("hatch_vcs", reason="needs '.[dev]'")

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHIPPED = {  # beside the package itself
    *(".gitignore", "PKG-INFO", "README.md", "LICENSE", "pyproject.toml"),
    *("CHANGELOG.md", "CITATION.cff", "constraints.txt", "environment.yml", "hatch_build.py"),
}


AUTHOR = ("-c", "user.name=Anybody", "-c", "user.email=anybody@example.org")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Return what a command prints; its own words are told where it fails."""
    # What is installed counts, not what lies about here.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def git(*words: str | Path, cwd: Path) -> str:
    return run("git", "-c", "safe.directory=*", *words, cwd=cwd)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone without tags, with what is not committed yet."""
    folder = tmp_path_factory.mktemp("clone") / "pipeinfer_dask"
    git("clone", "-q", "--no-tags", ROOT, folder, cwd=ROOT)
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink():
            continue  # it is in the clone already, and leads to what is there
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    git("add", "--all", cwd=folder)
    git(*AUTHOR, "commit", "-q", "--allow-empty", "-m", "as it is now", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def built(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution of the clone; the wheel is made from the latter."""
    target = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, clone, cwd=target)
    (wheel,), (source,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, source


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"pipeinfer_dask"}
    tracked = git("ls-files", "pipeinfer_dask", cwd=ROOT).splitlines()
    # Models, tokenizers, scripts and styles of the views, and the mark of types among them.
    assert {name for name in names if ".dist-info/" not in name} >= set(tracked)
    endings = {Path(name).suffix for name in names if ".dist-info/" not in name}
    known = {".py", ".js", ".css", ".json", ".safetensors", ".md", ".typed", ".yaml"}
    assert endings - {""} <= known, "something new is shipped: is it meant to be?"
    assert built[0].stat().st_size < 20e6


def test_the_source_holds_what_a_user_needs_and_no_more(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {name.split("/")[0] for name in names} == {
        "pipeinfer_dask",
        "examples",
        "notebooks",
        *SHIPPED,
    }
    endings = {Path(name).suffix for name in names if name.startswith("notebooks/")}
    assert endings == {".ipynb"}, "something new is shipped: is it meant to be?"


def metadata_version(folder: Path) -> str:
    return run(sys.executable, "-m", "hatchling", "version", cwd=folder).strip()


def test_the_version_is_that_of_the_tag(clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tagged"
    git("clone", "-q", clone, folder, cwd=tmp_path)
    git(*AUTHOR, "tag", "-a", "v1.2.3", "-m", "a release", cwd=folder)
    assert metadata_version(folder) == "1.2.3"


def test_a_clone_without_tags_has_a_development_version(clone: Path) -> None:
    assert metadata_version(clone).startswith("0.1.dev")


def test_a_copy_that_is_no_clone_has_a_version_too(clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git"))
    assert metadata_version(folder) == "0.1.dev0"


def test_a_release_by_the_checklist_leaves_a_repository_that_passes_its_tests(
    clone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "released"
    git("clone", "-q", clone, folder, cwd=tmp_path)
    run(sys.executable, "-m", "towncrier", "build", "--yes", "--version", "1.2.3", cwd=folder)
    cited = folder / "CITATION.cff"
    earlier = re.sub(r"^(version|date-released): .*\n", "", cited.read_text(), flags=re.M)
    cited.write_text(f"{earlier.rstrip()}\nversion: 1.2.3\ndate-released: 2026-01-31\n")
    git(*AUTHOR, "commit", "-q", "--all", "-m", "Release 1.2.3", cwd=folder)
    git(*AUTHOR, "tag", "-a", "v1.2.3", "-m", "1.2.3", cwd=folder)
    assert git("ls-files", "changelog.d", cwd=folder) == "", "all changes are collected"
    told = ("-k", "changelog or citation or change_is_told", "-p", "no:cacheprovider")
    said = run(
        sys.executable, "-m", "pytest", *told, "tests/repository/test_package.py", cwd=folder
    )
    assert "3 passed" in said


def test_an_index_shows_a_readme_whose_links_lead_somewhere(clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "addressed"
    git("clone", "-q", clone, folder, cwd=tmp_path)
    project = folder / "pyproject.toml"
    for address in ("", "https://forge.example/owner/name"):
        said = re.sub(
            r'^address = ".*"$', f'address = "{address}"', project.read_text(), flags=re.M
        )
        project.write_text(said)
        metadata = json.loads(run(sys.executable, "-m", "hatchling", "metadata", cwd=folder))
        readme = metadata["readme"]["text"]
        links = re.findall(r"\]\(([^)]+)\)", readme)
        assert all(link.startswith(("https://", "#")) for link in links)
        assert ("![" in readme) == bool(address)
        files = [link.partition("/HEAD/")[2] for link in links if "/HEAD/" in link]
        assert [name for name in files if not (folder / name.partition("#")[0]).is_file()] == []
        assert bool(files) == bool(address)
        assert metadata.get("urls", {}).get("Homepage", "") == address


@pytest.mark.cluster
def test_wheel_and_source_run_the_demo_in_an_empty_environment(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    pip, pipeinfer = environment / "bin" / "pip", environment / "bin" / "pipeinfer"
    version = built[0].name.split("-")[1]
    texts = []
    for file in built:
        # Nothing of the other one is there; what both need is not fetched twice, only looked for.
        assert not pipeinfer.exists()
        run(pip, "install", "-q", "-c", ROOT / "constraints.txt", file, cwd=tmp_path)
        assert run(pipeinfer, "--version", cwd=tmp_path).strip().endswith(version)
        said = run(pipeinfer, "demo", "--max-new-tokens", "8", "--json", cwd=tmp_path)
        texts += [result["text"] for result in json.loads(said.splitlines()[-1])["results"]]
        run(pip, "uninstall", "-q", "-y", "pipeinfer-dask", cwd=tmp_path)
        assert list(environment.rglob("pipeinfer_dask*")) == []
    assert len(texts) == 8
    assert len(set(texts)) == 1
