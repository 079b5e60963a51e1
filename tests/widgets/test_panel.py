"""Controls, dashboards and steppers without a page: what they do, and what they say."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from threading import Event, Lock
from typing import Any
from xml.etree import ElementTree

import pytest

import pipeinfer_dask as pi
from pipeinfer_dask.models.shard import Shard
from pipeinfer_dask.protocol.messages import Commit
from pipeinfer_dask.simulation import simulate
from pipeinfer_dask.trace import History
from pipeinfer_dask.trace.picture import LOOKS
from pipeinfer_dask.trace.text import ORIGINS, pieces_of
from pipeinfer_dask.trace.tree import KINDS
from pipeinfer_dask.widgets import Dashboard, DraftTree, Metrics, Stepper, Timeline, TokenStream
from pipeinfer_dask.widgets.still import COMMON, module, style


@pytest.fixture(scope="module")
def engine() -> Iterator[pi.Engine]:
    target, draft = pi.demo_pair()
    with pi.Engine.from_pretrained(target, draft, stages=2, in_process=True) as engine:
        yield engine


def test_run_starts_a_generation_that_all_views_show(engine: pi.Engine) -> None:
    board = engine.dashboard(max_new_tokens=20)
    assert isinstance(board, Dashboard)
    assert board.generation is None and board.controls.cancel.disabled
    board.controls.run.click()
    assert board.generation is not None
    result = board.generation.result(60)
    assert board.text.feed.wait(30)
    assert all(view.feed.trace is result.trace and view.channel.complete for view in board.views)
    assert board.channel.about["title"] == "adaptive"
    assert len(board.channel.texts["tokens"]) == 20
    assert "".join(board.channel.texts["tokens"]) == result.text


def test_cancel_stops_it(engine: pi.Engine) -> None:
    board = engine.dashboard(max_new_tokens=400)
    board.controls.run.click()
    assert board.generation is not None
    next(iter(board.generation))
    board.controls.cancel.click()
    assert board.generation.result(60).finish_reason == "stopped"


RUN = Shard.run
PATIENCE_S = 30.0


class Holder:
    """Holds both stages in the midst of a run before their next layers, until that is called off.

    Attributes
    ----------
    holds : Event
        Set when both compute a run and have layers of it before them: none begins any more.
    begun : int
        Layers that were begun since.
    left : dict of Shard to int
        How far each was with the run that it was held in.
    gone : Event
        Set when both have left it.
    """

    def __init__(self) -> None:
        self.holds, self.gone = Event(), Event()
        self.begun = 0
        self.left: dict[Shard, int] = {}
        self._lock, self._never = Lock(), Event()
        self._at: dict[Shard, int] = {}  # layers of its run that each stage has begun

    def run(self, shard: Shard, *batch: Any, stopped: Callable[[], bool], **how: Any) -> Any:
        def looked() -> bool:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                with self._lock:
                    if stopped():
                        if self.holds.is_set():
                            self.left.setdefault(shard, self._at[shard])
                        if len(self.left) == 2:
                            self.gone.set()
                        return True
                    # A stage looks once more behind its last layer.
                    midst = [0 < at < len(of.layers) for of, at in self._at.items()]
                    if len(midst) == 2 and all(midst):
                        self.holds.set()
                    if not self.holds.is_set() or time.monotonic() > deadline:
                        self.begun += self.holds.is_set()
                        self._at[shard] += 1
                        return False
                self._never.wait(0.001)

        self._rest(shard)
        try:
            return RUN(shard, *batch, stopped=looked, **how)
        finally:
            self._rest(shard)

    def _rest(self, shard: Shard) -> None:
        with self._lock:
            self._at[shard] = 0


def test_at_a_click_on_cancel_every_stage_leaves_its_run_where_it_is(
    engine: pi.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder()
    monkeypatch.setattr(Shard, "run", lambda *args, **how: holder.run(*args, **how))
    board = engine.dashboard(max_new_tokens=400)
    board.controls.strategy.value = "pipeinfer"
    board.controls.run.click()
    assert holder.holds.wait(60)
    board.controls.cancel.click()
    assert board.generation is not None
    assert board.generation.result(60).finish_reason == "stopped"
    assert holder.gone.wait(60)
    assert holder.begun == 0
    assert all(0 < layers < len(shard.layers) for shard, layers in holder.left.items())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ("micro_batch", "expected knobs as name=value, got 'micro_batch'"),
        ("micro_batch=four", "expected knobs as name=value, got 'micro_batch=four'"),
        ("microbatch=4", "there is no setting 'microbatch': did you mean 'micro_batch'?"),
        ("micro_batch=-1", "micro_batch"),
    ],
)
def test_what_can_not_be_run_is_said_and_starts_nothing(
    engine: pi.Engine, knobs: str, message: str
) -> None:
    controls = engine.dashboard().controls
    controls.knobs.value = knobs
    controls.run.click()
    assert controls.status.value.startswith("Not started: ")
    assert message in controls.status.value
    assert controls.generation is None and not controls.run.disabled


def test_knobs_reach_the_strategy(engine: pi.Engine) -> None:
    controls = engine.dashboard(max_new_tokens=4).controls
    controls.strategy.value = "pipeinfer"
    controls.knobs.value = "micro_batch=2, cancellation=False"
    controls.run.click()
    assert controls.generation is not None
    policy = controls.generation.policy
    assert policy.micro_batch == 2 and not policy.cancellation
    controls.generation.result(60)


def test_a_stepper_has_one_clock_and_one_scale_for_all() -> None:
    plain = simulate("iterative", stages=3, max_new_tokens=10)
    piped = simulate("pipeinfer", stages=3, max_new_tokens=10)
    stepper = Stepper(plain, piped, tree=True)
    kinds = [kind for kind in (Timeline, TokenStream, DraftTree) for _ in range(2)]
    assert all(map(isinstance, stepper.views, kinds)) and len(stepper.views) == len(kinds)
    assert [view.led for view in stepper.views if isinstance(view, Timeline)] == [False, True]
    spans = {view.span for view in stepper.views if isinstance(view, Timeline)}
    assert len(spans) == 1 and spans.pop() > 0
    clock = stepper.clock
    assert clock.steps == sorted(clock.steps)
    assert clock.last >= plain.trace.records[-1][0]
    assert clock.speed in clock.speeds
    page = stepper.to_html()
    assert page.count("Timeline: each node") == 2 and "iterative" in page


def test_what_a_stepper_draws_is_seen_at_once_where_it_stands_still_and_only_texts_are_folded() -> (
    None
):
    traces = [simulate(name, stages=3, max_new_tokens=10) for name in ("iterative", "pipeinfer")]
    page = Stepper(*traces, metrics=True, tree=True).to_html()
    folded = page.index("<summary>Texts</summary>")
    trees = [found.start() for found in re.finditer('alt="Draft tree at', page)]
    charts = [found.start() for found in re.finditer('alt="Tokens a second so far', page)]
    texts = [found.start() for found in re.finditer("<pre", page)]
    assert len(trees) == len(charts) == 2 and max(trees + charts) < folded < min(texts)
    opened = re.sub("<details>.*?</details>", "", page[:folded])  # the same as tables
    assert opened.count('alt="Draft tree at') == opened.count('alt="Tokens a second so far') == 2


def test_a_stepper_calls_its_traces_as_it_is_told() -> None:
    traces = [simulate("pipeinfer", stages=2, max_new_tokens=4, micro_batch=n) for n in (1, 2)]
    stepper = Stepper(*traces, titles=["one by one", "two at a time"])
    told = [view.channel.about["title"] for view in stepper.views]
    assert told == ["one by one", "two at a time"] * 2
    assert "<b>two at a time</b>: 4 tokens in" in stepper.to_html()
    unfit: list[Any] = [["one"], "ab", 2, ["one", None]]
    for titles in unfit:
        with pytest.raises(ValueError, match="expected a title for each of 2"):
            Stepper(*traces, titles=titles)


def test_a_slip_in_the_name_of_a_setting_of_a_view_is_told() -> None:
    simulation = simulate("pipeinfer", stages=2, max_new_tokens=4)
    told = "there is no setting 'momment' of a Timeline: did you mean 'moment'"
    with pytest.raises(ValueError, match=told):
        Timeline(simulation, momment=0.1)
    with pytest.raises(ValueError, match="there is no setting 'colour' of a Metrics: look for"):
        Metrics(simulation, colour="red")
    assert Timeline(simulation, moment=0.1, layout={"width": "300px"}).layout.width == "300px"


def svgs(page: str) -> list[ElementTree.Element]:
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    return [ElementTree.fromstring(base64.b64decode(data)) for data in found]


def said(picture: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]


def told_of(page: str) -> tuple[int, int]:
    [(opened, out)] = re.findall(r": (\d+) guesses open, (\d+) ruled out just now(?:,|<)", page)
    return int(opened), int(out)


def test_a_frozen_tree_stands_where_most_guesses_were_open() -> None:
    simulation = simulate("pipeinfer", stages=3, max_new_tokens=20)
    story = Timeline(simulation).feed.history
    moments = {guess.made for guess in story.guesses if guess.ahead}
    opened, _ = told_of(DraftTree(simulation).to_html())
    assert 0 < opened < 20  # all are drawn
    assert opened == max(
        sum(
            each.made <= moment and (each.settled is None or each.settled > moment)
            for each in story.guesses
            if each.ahead
        )
        for moment in moments
    )


def test_a_frozen_tree_of_a_chosen_moment_is_what_was_guessed_then() -> None:
    simulation = simulate("pipeinfer", stages=3, max_new_tokens=20)
    story = Timeline(simulation).feed.history
    for token in story.tokens[4:10]:
        moment = token.time - story.began
        opened, _ = told_of(DraftTree(simulation, moment=moment).to_html())
        assert opened == sum(
            each.made <= token.time and (each.settled is None or each.settled > token.time)
            for each in story.guesses
            if each.ahead
        )
    assert ": nothing was guessed" in DraftTree(simulation, moment=0.0).to_html()
    assert ": nothing was guessed" not in Stepper(simulation, tree=True).to_html()


def test_a_frozen_tree_is_drawn_with_its_likeliest_guesses_and_the_same_as_a_table() -> None:
    page = DraftTree(simulate("adaptive", stages=8, max_new_tokens=20)).to_html()
    opened, out = told_of(page)
    assert opened > 20 and ", the likeliest shown" in page
    tree = svgs(page)[0]
    frames = [rect for rect in tree.iter("{http://www.w3.org/2000/svg}rect") if rect.get("rx")]
    drawn = len(frames) - 2  # of the text
    assert 20 <= drawn <= 20 + min(out, 8)
    assert re.search(r"\d+%", " ".join(said(tree)))
    assert re.search(r"run \d+ slot \d+", " ".join(said(tree)))
    rows = re.findall("<tr><td>.*?</tr>", page)
    assert len(rows) == drawn
    assert all(re.search(r"<td>\d+%</td>.*<td>(became text|ruled out)</td>", row) for row in rows)
    assert 'alt="Draft tree at' in page


def test_a_frozen_tree_shows_struck_through_what_was_ruled_out_just_then() -> None:
    page = DraftTree(simulate("adaptive", stages=8, max_new_tokens=100)).to_html()
    struck = [
        text
        for text in svgs(page)[0].iter("{http://www.w3.org/2000/svg}text")
        if text.get("text-decoration") == "line-through"
    ]
    assert len(struck) == page.count("<td>ruled out just now</td>") > 0


def test_a_tree_of_guesses_made_before_the_first_token_hangs_from_the_prompt() -> None:
    trace = simulate("pipeinfer", stages=4, max_new_tokens=4).trace
    first = next(at for at, (_, what) in enumerate(trace) if isinstance(what, Commit))
    early = pi.Trace(trace.stages)
    for entry in trace.records[:first]:
        early.add(*entry)
    history = History(early)
    assert not history.tokens and any(guess.kept for guess in history.guesses)
    assert len(svgs(DraftTree(early).to_html())) > 1  # the legend has some, too


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
def test_whatever_has_a_text_has_a_frozen_tree_that_is_drawn(strategy: str) -> None:
    page = DraftTree(simulate(strategy, stages=2, max_new_tokens=3)).to_html()
    assert 'alt="Draft tree at' in page
    assert ("nothing was guessed" in page) is (strategy == "iterative")


def test_a_live_tree_and_a_frozen_one_have_the_same_words_and_marks() -> None:
    source = module("tree.js")
    for kind in KINDS.values():
        assert f'meaning: "{kind.meaning}"' in source
        assert f"wide: {kind.wide:g}" in source
    for words in ("%: how sure the draft model is", "slot: place in the cache"):
        assert words in source and words in DraftTree(simulate(stages=2)).to_html()


def test_a_frozen_text_can_show_what_was_guessed_and_ruled_out_struck_through() -> None:
    simulation = simulate("pipeinfer", stages=3, acceptance=0.5, max_new_tokens=30)
    story = Timeline(simulation).feed.history
    places = {token.guess.position for token in story.tokens}
    ruled_out = {
        (guess.position, guess.token)
        for guess in story.settled
        if guess.ahead and not guess.kept and guess.position in places
    }
    page = TokenStream(simulation).to_html()
    plain, struck = re.findall("<pre.*?</pre>", page)
    assert "<s " not in plain and struck.count("<s ") == len(ruled_out) > 0
    assert "<details open>" in page
    assert re.sub("<[^>]*>", "", re.sub("<s .*?</s>", "", struck)) == simulation_text(story)
    assert "<details>" in pi.simulate("pipeinfer", stages=3)._repr_html_()
    assert "struck through" not in TokenStream(simulate("iterative", stages=2)).to_html()


def test_a_frozen_text_of_a_chosen_moment_is_what_there_was_then() -> None:
    simulation = simulate("pipeinfer", stages=3, acceptance=0.5, max_new_tokens=30)
    story = Timeline(simulation).feed.history
    for number, token in list(enumerate(story.tokens, 1))[::7]:
        page = TokenStream(simulation, moment=token.time - story.began).to_html()
        plain, *struck = re.findall("<pre.*?</pre>", page)
        there = "".join(pieces_of(story)[:number])
        assert re.sub("<[^>]*>", "", plain) == there
        places = {each.guess.position for each in story.tokens[:number]}
        ruled_out = {
            (guess.position, guess.token)
            for guess in story.settled
            if guess.ahead and guess.ruled_out and guess.settled <= token.time  # type: ignore[operator]
            if guess.position in places
        }
        assert "".join(struck).count("<s ") == len(ruled_out)
    begin = TokenStream(simulation, moment=0.0).to_html()
    assert re.sub("<[^>]*>", "", re.findall("<pre.*?</pre>", begin)[0]) == ""
    assert simulation_text(story) in re.sub("<[^>]*>", "", Stepper(simulation).to_html())


def simulation_text(story: History) -> str:
    return "".join(pieces_of(story))


def test_frozen_figures_say_how_many_guesses_became_text_at_each_depth() -> None:
    simulation = simulate("adaptive", stages=4, max_new_tokens=30)
    page = Metrics(simulation).to_html()
    counts = re.findall(r"<td>\d+</td><td>(\d+) of (\d+)</td></tr>", page)
    settled = [guess for guess in Timeline(simulation).feed.history.settled if guess.ahead]
    assert sum(int(kept) for kept, _ in counts) == sum(guess.kept for guess in settled) > 0
    assert sum(int(count) for _, count in counts) == len(settled)


def test_frozen_figures_are_charts_with_a_description_each_and_the_same_as_tables() -> None:
    simulation = simulate("adaptive", stages=4, max_new_tokens=30)
    metrics = simulation.metrics
    page = Metrics(simulation).to_html()
    source = module("metrics.js")
    titles = re.findall(r'alt="([^:"]+): ', page)
    assert len(titles) == len(svgs(page)) == 5
    assert all(f'"{title}"' in source for title in titles)
    cards = dict(re.findall(r"<b [^>]*>([^<]*)</b>([^<]*)<", page))
    assert cards[f"{metrics.tokens_per_s:.1f}"] == "tokens a second"
    assert all(f'["{name}"' in source for name in cards.values()) and len(cards) == 5
    for picture in svgs(page)[:3]:
        [line] = [path for path in picture.iter() if path.get("stroke-width") == "2"]
        assert (line.get("d") or "").count("L") > 5
    depths = [guess.ahead for guess in Timeline(simulation).feed.history.settled if guess.ahead]
    bars = [each for each in svgs(page)[3].iter() if each.get("fill") == "#009e73"]
    assert len(bars) == min(24, max(depths))
    last = simulation.trace.records[-1][0]
    *_, (until, tokens) = re.findall(r"<tr><td>([0-9.]+) ms</td><td>(\d+)</td>", page)
    assert float(until) <= 1e3 * last + 0.1 and int(tokens) == 30


def test_frozen_figures_of_a_chosen_moment_are_those_of_what_was_known_then() -> None:
    simulation = simulate("adaptive", stages=4, max_new_tokens=30)
    story = Timeline(simulation).feed.history
    for figures in story.figures[::5]:
        took = figures.time - story.began
        page = Metrics(simulation, moment=took).to_html()
        *_, (until, tokens) = re.findall(r"<tr><td>([0-9.]+) ms</td><td>(\d+)</td>", page)
        assert (until, int(tokens)) == (f"{1e3 * took:.1f}", figures.generated)
        assert f">{figures.generated / took:.1f}</b>tokens a second" in page
    whole = Metrics(simulation).to_html()
    assert whole in Stepper(simulation, metrics=True).to_html()


def test_a_dashboard_steps_through_what_is_over(engine: pi.Engine) -> None:
    board = engine.dashboard(max_new_tokens=12)
    assert board.clock.last == 0
    board.show(simulate("pipeinfer", stages=2, max_new_tokens=10))
    assert board.clock.last >= board.channel.feed.now and len(board.clock.steps) > 10
    assert board.clock.moment == -1


def test_a_stepper_takes_only_what_is_over(engine: pi.Engine) -> None:
    with pytest.raises(ValueError, match="expected at least one trace"):
        Stepper()
    running = engine.start("def", max_new_tokens=400)
    with pytest.raises(ValueError, match="expected finished generations"):
        Stepper(running)
    running.cancel()
    running.result(60)


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


@pytest.mark.parametrize("kind", [Timeline, Metrics, TokenStream, DraftTree])
def test_a_frozen_view_escapes_the_models_text(kind: type[Timeline]) -> None:
    trace = simulate("pipeinfer", stages=2, acceptance=0.6, max_new_tokens=20).trace
    trace.texts = dict.fromkeys(range(-9, 1000), "<script>alert(1)</script>")
    tags = Tags(kind(trace).to_html()).found
    assert "script" not in tags and tags


@pytest.mark.parametrize("kind", [Timeline, Metrics, TokenStream, DraftTree])
def test_a_view_of_nothing_stands_still(kind: type[Timeline]) -> None:
    assert kind(pi.Trace(2)).to_html()


def test_no_two_looks_of_bars_or_of_text_differ_by_colour_alone() -> None:
    assert len({look.pattern for look in LOOKS.values()}) == len(LOOKS)
    assert len({line for _, line, _ in ORIGINS.values()}) == len(ORIGINS)


def test_modules_and_style_name_nothing_outside_the_page() -> None:
    static = Path(pi.__file__).parent / "widgets" / "static"
    names = [path.name for path in static.glob("*.js") if path.name not in COMMON]
    assert len(names) == 8
    for source in (*map(module, names), style()):
        assert "import " not in source.replace("importance", "")
        assert "innerHTML" not in source
        links = source.replace("http://www.w3.org/2000/svg", "")
        assert "http" not in links and "url(" not in links
