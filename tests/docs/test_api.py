"""The API page names all that is public, and what it names is documented in numpydoc form."""

import ast
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from docs.make_architecture import ROOT, named, public
from pipeinfer_dask.runtime.head.head import Served
from pipeinfer_dask.widgets.feed import View
from tests.docs.blocks import PAGES, blocks

NAMES = [name for section in public() for name in section.names]
MODULES = sorted({name.rpartition(".")[0] for name in NAMES})
MATTERS_OF_TASTE = {
    "SA01",  # no See Also
    "EX01",  # no example: the pages have them, and run them
    "ES01",  # no extended summary, where the summary says it
}


def untold(name: str, thing: Any) -> set[str]:
    """Return the parameters that a docstring leaves out, where numpydoc sees some missing.

    What a class is made of may be told as attributes, and what its methods are given by the class.
    """
    if inspect.isclass(thing) and issubclass(thing, Enum):
        return set()  # nobody makes one
    docscrape = pytest.importorskip("numpydoc.docscrape", reason="needs '.[docs]'")
    sections = docscrape.NumpyDocString(inspect.getdoc(thing))
    rows = [*sections["Parameters"], *sections["Attributes"]]
    told = {each.strip(" *") for row in rows for each in row.name.split(",")}
    if name not in NAMES:
        owner = named(name.rpartition(".")[0])
        told |= {"self", *re.findall(r"``(\w+)``", inspect.getdoc(owner) or "")}
    return {each for each in inspect.signature(thing).parameters if each[0] != "_"} - told


def parts(name: str) -> Iterator[tuple[str, Any]]:
    """Yield an object, and the public methods and properties of a class, by full name.

    Those too that it has from a class of ours without a page of its own. What only we call is left
    out here and on the pages: its docstring says ``:meta private:``.
    """
    thing = named(name)
    yield name, thing
    if inspect.isclass(thing):
        with_pages = [named(each) for each in NAMES if each != name]
        members: dict[str, Any] = {}
        for owner in thing.__mro__:
            if owner.__module__.startswith("pipeinfer_dask.") and owner not in with_pages:
                members = vars(owner) | members
        for member, value in members.items():
            if (
                not member.startswith("_")
                and (
                    inspect.isfunction(value)
                    or isinstance(value, (property, cached_property, classmethod))
                )
                and ":meta private:" not in (inspect.getdoc(value) or "")
            ):
                yield f"{name}.{member}", getattr(thing, member)


def test_the_page_lists_every_name_once() -> None:
    things = [named(name) for name in NAMES]
    assert len(things) == len(set(things))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_itself_which_of_its_names_are_public(module: str) -> None:
    listed = {name.rpartition(".")[2] for name in NAMES if name.rpartition(".")[0] == module}
    said = set(import_module(module).__all__)
    assert listed <= said
    # The page lists a name once: what the package itself has, too, stands there.
    assert {named(f"{module}.{name}") for name in said} <= {named(name) for name in NAMES}


def foreign(code: str) -> set[str]:
    """Return what a program imports of the package that is not public."""
    used = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pipeinfer_dask")
        for alias in node.names
    }
    return used - {*NAMES, *MODULES}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_use_public_names_alone(path: Path) -> None:
    assert foreign(path.read_text(encoding="utf-8")) == set()


def test_pages_use_public_names_alone() -> None:
    programs = [(page, b.code) for page in PAGES for b in blocks(page) if b.language == "python"]
    assert len(programs) > 20
    found = [(page.name, name) for page, code in programs for name in sorted(foreign(code))]
    assert found == []


def test_a_page_shows_what_its_class_inherits_from_one_without_a_page(tmp_path: Path) -> None:
    pytest.importorskip("numpydoc", reason="needs '.[docs]'")
    build = pytest.importorskip("sphinx.cmd.build", reason="needs '.[docs]'")
    shown = {
        "pipeinfer_dask.Engine": "start",
        "pipeinfer_dask.Generation": "result",
        "pipeinfer_dask.widgets.Timeline": "freeze",
    }
    template = (ROOT / "docs" / "_templates" / "autosummary" / "class.rst").read_text("utf-8")
    pages = "".join(
        template[template.index(".. autoclass") :].replace("{{ objname }}", name) for name in shown
    )
    (tmp_path / "index.rst").write_text(f"API\n===\n\n{pages}")
    settings = ["extensions=numpydoc,sphinx.ext.autodoc", "numpydoc_show_class_members=0"]
    options = [word for setting in settings for word in ("-D", setting)]
    assert build.main(["-q", "-C", *options, str(tmp_path), str(tmp_path / "made")]) == 0
    page = (tmp_path / "made" / "index.html").read_text("utf-8")
    for name, member in shown.items():
        assert f'id="{name}.{member}"' in page
    assert 'id="pipeinfer_dask.widgets.Timeline.traits"' not in page, "that is not ours"
    for name in ("Generation.record", "widgets.Timeline.wind"):
        assert f'id="pipeinfer_dask.{name}"' not in page, "that is for us alone"


@pytest.mark.parametrize("caller", [Served, View])
def test_what_heads_and_feeds_call_stands_on_no_page(caller: type) -> None:
    called = {member for member in vars(caller) if not member.startswith("_")}
    shown = {part.rpartition(".")[2] for name in NAMES for part, _ in parts(name) if part != name}
    assert called
    assert called & shown == set()


@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_public_has_a_docstring(name: str) -> None:
    assert [part for part, thing in parts(name) if not inspect.getdoc(thing)] == []


# Widgets have old traits that warn whoever looks at all members.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_docstrings_have_numpydoc_form(name: str) -> None:
    numpydoc = pytest.importorskip("numpydoc.validate", reason="needs '.[docs]'")
    wrong = [
        f"{part}: {code} {message}"
        for part, thing in parts(name)
        if thing.__doc__  # an override may leave it to what it overrides
        for code, message in numpydoc.validate(part)["errors"]
        if code not in MATTERS_OF_TASTE
        if code != "PR01" or untold(part, thing)
    ]
    assert wrong == []
