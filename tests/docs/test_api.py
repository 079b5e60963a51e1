"""The API page names all that is public, and what it names is documented in numpydoc form."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeinfer_dask

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
MODULE = re.compile(r"^\.\. currentmodule:: (\S+)$|^   (\w+)$", re.M)
MATTERS_OF_TASTE = {
    "SA01",  # no See Also
    "EX01",  # no example: the pages have them, and run them
    "ES01",  # no extended summary, where the summary says it
    "PR01",  # a dataclass documents its attributes; a method may refer to another one's parameters
    "PR04",  # several parameters of one type, each on its line
    "PR07",  # a parameter whose name says it
    "RT01",  # "Return ..." in the summary
}


def listed() -> list[str]:
    """Return the full names that the page lists."""
    names, module = [], ""
    for found in MODULE.finditer(PAGE.read_text(encoding="utf-8")):
        module = found[1] or module
        if found[2]:
            names.append(f"{module}.{found[2]}")
    return names


def found(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def parts(name: str) -> Iterator[tuple[str, Any]]:
    """Yield an object, and the public methods and properties that a class adds, by full name."""
    thing = found(name)
    yield name, thing
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and (
                inspect.isfunction(value) or isinstance(value, (property, classmethod))
            ):
                yield f"{name}.{member}", getattr(thing, member)


def test_the_page_lists_every_public_name_once() -> None:
    names = listed()
    assert len(names) == len(set(names))
    public = {getattr(pipeinfer_dask, name) for name in pipeinfer_dask.__all__}
    assert public <= {found(name) for name in names}


@pytest.mark.parametrize("name", listed())
def test_all_that_is_public_has_a_docstring(name: str) -> None:
    assert [part for part, thing in parts(name) if not inspect.getdoc(thing)] == []


# Widgets have old traits that warn whoever looks at all members.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", listed())
def test_docstrings_have_numpydoc_form(name: str) -> None:
    numpydoc = pytest.importorskip("numpydoc.validate", reason="needs '.[docs]'")
    wrong = [
        f"{part}: {code} {message}"
        for part, thing in parts(name)
        if thing.__doc__  # an override may leave it to what it overrides
        for code, message in numpydoc.validate(part)["errors"]
        if code not in MATTERS_OF_TASTE
    ]
    assert wrong == []
