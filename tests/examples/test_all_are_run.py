"""No example is without a test, and the page of the examples leaves none out."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.conftest import EXAMPLES

ROOT = EXAMPLES.parent
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


def started(test: Path) -> Iterator[str]:
    """Yield the files that a test module runs: by their names, or through the fixture `example`."""
    for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(ast.Name("example"), [ast.Constant(str(name))]):
                yield Path(name).stem + ".py"
            case ast.Constant(str(name)) if name.endswith(".py"):
                yield Path(name).name


@pytest.mark.parametrize("name", NAMES)
def test_each_example_is_run_by_a_test(name: str) -> None:
    tests = [*(ROOT / "tests" / "examples").glob("*.py"), *(ROOT / "tests" / "hpc").glob("*.py")]
    assert name in {each for test in tests for each in started(test)}


def test_the_page_tells_of_each_example_and_shows_it() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+\.py)` \|", page, re.M)) == NAMES
    assert sorted(re.findall(r"{literalinclude} ../examples/(\w+\.py)$", page, re.M)) == NAMES
