"""Tables and pictures that programs make are as the programs make them now."""

import pytest

from docs import make_architecture, make_concepts
from tests.repository.test_layers import LAYERS


def test_tables_of_the_architecture_are_those_of_the_code() -> None:
    page = make_architecture.PAGE.read_text(encoding="utf-8")
    assert make_architecture.filled(page) == page, "run python -m docs.make_architecture"


def test_packages_stand_in_the_order_in_which_imports_may_run() -> None:
    assert tuple(make_architecture.PACKAGES) == LAYERS


def test_a_line_count_stands_until_it_is_off_by_more_than_a_tenth() -> None:
    count = make_architecture.lines("core")
    for said, stands in ((count + count // 20, True), (count * 2, False)):
        shown = f"| `core` | {said} |"
        assert (shown in make_architecture.packages_table(shown)) == stands


@pytest.mark.parametrize("name", make_concepts.PICTURES)
def test_pictures_of_the_concepts_show_what_the_simulator_does(name: str) -> None:
    picture = make_concepts.IMAGES / f"concept-{name}.svg"
    told = "run python -m docs.make_concepts"
    assert picture.read_text(encoding="utf-8") == make_concepts.drawn(name), told


def test_table_of_the_concepts_has_the_figures_of_its_pictures() -> None:
    page = make_concepts.PAGE.read_text(encoding="utf-8")
    assert make_concepts.filled(page) == page, "run python -m docs.make_concepts"
