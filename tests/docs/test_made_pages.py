"""Tables and pictures that programs make are as the programs make them now."""

import json
import re
from datetime import date
from pathlib import Path

import pytest

from docs import make_architecture, make_concepts, make_performance, make_policies, make_printed
from docs.import_reasons import REASONS
from pipeinfer_dask.bench.policies import Job, measure
from pipeinfer_dask.policies import STRATEGIES
from pipeinfer_dask.protocol.messages import Command
from pipeinfer_dask.simulation import Costs, simulate
from tests.repository.test_layers import LAYERS


def test_tables_of_the_architecture_are_those_of_the_code() -> None:
    page = make_architecture.PAGE.read_text(encoding="utf-8")
    assert make_architecture.filled(page) == page, "run python -m docs.make_architecture"


def commands_by_event() -> dict[str, set[str]]:
    """Return what the page says: the commands that each event may lead to."""
    page = make_architecture.PAGE.read_text(encoding="utf-8")
    table = page.partition("<!-- table: machine -->")[2].partition("<!-- end -->")[0]
    said: dict[str, set[str]] = {}
    for line in table.strip().splitlines()[2:]:
        events, _, _, _, commands = line.strip("| ").split(" | ")
        for event in re.findall(r"`(\w+)`|(after each)", events):
            said.setdefault("".join(event), set()).update(re.findall(r"`(\w+)`", commands))
    return said


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_machine_does_what_its_table_says_and_nothing_else(strategy: str) -> None:
    said = commands_by_event()
    event = ""
    for _, what in simulate(strategy, stages=4, acceptance=0.6, max_new_tokens=40).trace:
        name = type(what).__name__
        if isinstance(what, Command):
            assert name in said[event] | said["after each"], f"{event} led to {name}"
        else:
            event = name


def test_the_index_of_decisions_leaves_out_none_and_has_no_gap() -> None:
    folder = make_architecture.PAGE.parent
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[\d+\]\((\d+-.*\.md)\)", index, re.M)) == sorted(
        path.name for path in folder.glob("[0-9]*.md")
    )
    for path in folder.glob("[0-9]*.md"):
        title, _, state = path.read_text(encoding="utf-8").splitlines()[:3]
        assert (title[:8], state[:7]) == (f"# {path.name[:4]}. ", "State: ")
    numbers = [int(number) for number in re.findall(r"^\| \[?(\d{4})\b", index, re.M)]
    assert numbers == [*range(1, len(numbers) + 1)]


def test_packages_stand_in_the_order_in_which_imports_may_run() -> None:
    assert tuple(make_architecture.PACKAGES) == LAYERS


def test_an_import_without_a_reason_makes_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {**REASONS, "cli": {"engine": REASONS["cli"]["engine"]}}
    monkeypatch.setattr(make_architecture, "REASONS", without)
    with pytest.raises(ValueError, match="imports of cli without a reason"):
        make_architecture.imports_table()


def test_the_machines_table_says_what_state_a_loss_and_its_end_lead_to() -> None:
    rows = [
        line.strip("| ").split(" | ") for line in make_architecture.machine_table().splitlines()
    ]
    following = {event: state for event, _, _, state, _ in rows}
    assert following["`StageLost`"] == "`self.generation = AWAY`"
    assert following["`StagesBack`"] == "`self.generation = event.generation`"
    assert "`self.draft_generation = AWAY`" in following["`DrafterLost`"]
    assert following["`Woken`"] == "-"


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


def test_what_the_concepts_say_of_a_slower_draft_model_is_what_the_simulator_says() -> None:
    costs = Costs.even(make_concepts.STAGES, stage_s=0.05, token_cost=0.05, draft_cost=0.3)
    speeds = []
    for name in ("asynchronous", "speculative"):
        strategy, knobs = make_concepts.PICTURES[name]
        metrics = simulate(strategy, **{**make_concepts.WORLD, "costs": costs}, **knobs).metrics
        speeds.append(f"{metrics.tokens_per_s:.1f}")
    told = f"{speeds[0]} tokens/s against {speeds[1]}"
    assert told in make_concepts.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", make_performance.PAGES, ids=lambda path: str(path.name))
def test_tables_of_what_was_measured_have_its_figures(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert make_performance.PAGES[path](page) == page, "run python -m docs.make_performance"


def test_what_several_users_are_told_of_the_papers_method_is_what_the_simulator_says() -> None:
    page = make_performance.USERS.read_text(encoding="utf-8")
    speeds = make_performance.speeds_together
    (alone,) = speeds("pipeinfer", 1)
    two, *more = [n * min(speeds("pipeinfer", n)) / alone for n in (2, 4, 8)]
    told = f"{two:.1f} times one alone for two requests, and {min(more):.1f} to {max(more):.1f}"
    assert f"together {told} times for more" in page


def test_table_of_printed_figures_is_made_of_what_was_written_down() -> None:
    page = make_printed.PAGE.read_text(encoding="utf-8")
    assert make_printed.filled(page) == page, "run python -m docs.make_printed"


def test_tables_of_the_policies_have_the_figures_that_were_simulated() -> None:
    page = make_policies.PAGE.read_text(encoding="utf-8")
    assert make_policies.filled(page) == page, "run python -m docs.make_policies"


def test_picture_of_the_policies_shows_the_figures_that_were_simulated() -> None:
    drawing = pytest.importorskip("matplotlib", reason="needs '.[docs]'")
    picture = make_policies.PICTURE.read_text(encoding="utf-8")
    if f"Matplotlib v{drawing.__version__}," not in picture:
        pytest.skip("the picture was drawn by another version of matplotlib")
    assert make_policies.drawn() == picture, "run python -m docs.make_policies"


def test_what_is_said_of_the_policies_in_passing_is_what_their_summary_says() -> None:
    summary = make_policies.stored("policies")["summary"]
    page = make_printed.PAGE.read_text(encoding="utf-8")
    for name in ("pipeinfer / speculative", "adaptive / speculative"):
        figures = summary[name]
        expected = f"{figures['least']:.2f} to {figures['most']:.2f} times as fast"
        assert expected in page
        assert f"{figures['geometric_mean']:.2f})" in page


def test_the_stored_figures_of_the_policies_are_those_of_the_code() -> None:
    row = make_policies.stored("policies")["rows"][1]
    world = row["stages"], row["acceptance"], row["token_cost"]
    for column in ("iterative", "speculative", "pipeinfer", "adaptive"):
        alone = {"sequences": 1} if column == "pipeinfer" else {}
        knobs = tuple((alone | row["settings"].get(column, {})).items())
        speed = measure(Job(*world, column, knobs, seeds=5, tokens=500)).tokens_per_s
        told = "run python -m docs.make_policies policies ablation"
        assert speed == pytest.approx(row[column], abs=6e-4), told


@pytest.mark.parametrize("suite", [*make_performance.SUITES, "load"])
def test_a_stored_measurement_says_where_and_when(suite: str) -> None:
    stored = json.loads((make_performance.STORE / f"{suite}.json").read_text(encoding="utf-8"))
    assert stored["suite"] == suite
    assert stored["rows"]
    assert stored["machine"].keys() == make_performance.machine().keys()
    assert date.fromisoformat(stored["machine"]["date"]) <= date.today()
