"""Traces in files come back as they were, or not at all."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeinfer_dask.models.demo_pair import demo_pair
from pipeinfer_dask.protocol.messages import LEFT_OUT, Command, Event, RunDone
from pipeinfer_dask.protocol.sampling import Sampling
from pipeinfer_dask.runtime.head.text import TokenTexts
from pipeinfer_dask.simulation import simulate
from pipeinfer_dask.trace import History, Trace

numbers = st.floats(allow_nan=False)
tokens = st.lists(st.integers()).map(tuple)
words = st.lists(st.integers(), min_size=1).map(tuple)
shares = st.floats(0, 1, exclude_min=True)
st.register_type_strategy(float, numbers)
st.register_type_strategy(
    Sampling,
    st.builds(
        Sampling,
        seed=st.none() | st.integers(0, 2**63 - 1),
        temperature=st.floats(1e-6, 1e6),
        top_k=st.integers(0, 2**31 - 1),
        top_p=shares,
        top_h=st.none() | shares,
        bad_words_ids=st.lists(words).map(tuple),
        sequence_bias=st.lists(st.tuples(words, st.floats(max_value=9))).map(tuple),
        suppress_tokens=tokens,
        end_tokens=tokens,
    ),
)
records = st.lists(st.tuples(numbers, st.one_of(*map(st.from_type, get_args(Command | Event)))))


def reloaded(trace: Trace, path: Path) -> Trace:
    trace.save(path)
    return Trace.load(path)


@given(records=records, pieces=st.lists(st.text()), stages=st.integers(1, 99))
def test_any_record_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Any],
    pieces: list[str],
    stages: int,
) -> None:
    trace = Trace(stages, records, {}, pieces)
    assert reloaded(trace, tmp_path_factory.getbasetemp() / "any.trace") == trace


@pytest.mark.parametrize("strategy", ["iterative", "speculative", "pipeinfer", "adaptive"])
def test_a_generation_comes_back_exactly(strategy: str, tmp_path: Path) -> None:
    trace = simulate(strategy, stages=3, max_new_tokens=40).trace
    loaded = reloaded(trace, tmp_path / "trace")
    assert loaded == trace
    assert loaded.metrics() == trace.metrics()


def test_a_pick_that_was_left_out_has_no_text(tmp_path: Path) -> None:
    trace = Trace(1, texts=TokenTexts(AutoTokenizer.from_pretrained(demo_pair().target)))
    trace.add(0.0, RunDone(request=0, generation=0, run=0, tokens=(LEFT_OUT, 5)))
    assert list(reloaded(trace, tmp_path / "trace").texts) == [5]


def test_texts_of_the_tokens_that_occur_are_kept(tmp_path: Path) -> None:
    trace = simulate("adaptive", stages=2, max_new_tokens=20).trace
    trace.texts = {token: f"<{token}\u2028\ud800>" for token in range(-9, 9_999)}
    loaded = reloaded(trace, tmp_path / "trace")
    committed = [token.guess.token for token in History(trace).tokens]
    for token in committed:
        assert loaded.text_of(token) == trace.text_of(token) == f"<{token}\u2028\ud800>"
    assert len(loaded.texts) < 500
    assert loaded.text_of(-9) == "#-9"


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    simulate("pipeinfer", stages=2, max_new_tokens=5).trace.save(tmp_path / "trace")
    return (tmp_path / "trace").read_text().splitlines()


def damaged(lines: list[str], tmp_path: Path) -> str:
    path = tmp_path / "damaged"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="save the trace again") as caught:
        Trace.load(path)
    return str(caught.value)


def test_a_file_that_was_cut_short_is_refused(lines: list[str], tmp_path: Path) -> None:
    assert "entries instead of" in damaged(lines[:-1], tmp_path)
    assert f"line {len(lines)}" in damaged([*lines[:-1], lines[-1][:-3]], tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        '[0.0, "Begun", {"request": 0}]',
        '[0.0, "Begin", {"request": "0"}]',
        '[0.0, "Begin", {"request": true}]',
        '[0.0, "Begin", {}]',
        '[0.0, "Begin", {"request": 0, "more": 0}]',
        '["0", "Begin", {"request": 0}]',
        '[0.0, "Commit", {"request": 0, "tokens": [1, null], "origins": []}]',
        '[0.0, "Commit", {"request": 0, "tokens": [], "origins": ["guessed"]}]',
        '[0.0, ["Begin"], {"request": 0}]',
        "null",
    ],
)
def test_an_entry_that_no_machine_made_is_refused(
    entry: str, lines: list[str], tmp_path: Path
) -> None:
    assert "is damaged at line 2" in damaged([lines[0], entry, *lines[2:]], tmp_path)


@pytest.mark.parametrize("text", ["", "null", "{}", "[1", "\x00\x01", "é" * 9, "[" * 100_000])
def test_a_file_of_something_else_is_named_as_such(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"expected a trace that Trace\.save wrote, got .*other"):
        Trace.load(path)


def test_a_trace_of_a_later_version_says_so(lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "later"
    header = json.loads(lines[0]) | {"version": 2}
    path.write_text("\n".join([json.dumps(header), *lines[1:]]))
    with pytest.raises(ValueError, match="expected a trace of version 1, got 2"):
        Trace.load(path)


def test_a_file_that_is_not_there_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing: name one"):
        Trace.load(tmp_path / "nothing")
    (tmp_path / "here").touch()
    told = r"you may write, got .*here/trace .*: name anoth"
    for write in (Trace(1).save, Trace(1).to_perfetto):
        with pytest.raises(FileNotFoundError, match=r"there is no directory .*nowhere: make it"):
            write(tmp_path / "nowhere" / "trace")
        with pytest.raises(NotADirectoryError, match=told):
            write(tmp_path / "here" / "trace")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_disk_that_is_full_is_told_with_the_file() -> None:
    told = r"expected a file that you may write, got /dev/full \(No space left on device\): name"
    for write in (Trace(1).save, Trace(1).to_perfetto):
        with pytest.raises(OSError, match=told):
            write("/dev/full")


@pytest.fixture
def nearly_full_disk() -> Iterator[None]:
    """Let no file grow beyond a page: the rest of a longer one is refused by the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_can_not_be_written_to_its_end_leaves_the_older_one(
    tmp_path: Path, nearly_full_disk: None
) -> None:
    trace = simulate("pipeinfer", stages=2, max_new_tokens=200).trace
    told = r"expected a file that you may write, got .* \(File too large\)"
    for write in (trace.save, trace.to_perfetto):
        (tmp_path / "older").write_text("older")
        for name in ("older", "new"):
            with pytest.raises(OSError, match=told):
                write(tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == ["older"]
        assert (tmp_path / "older").read_text() == "older"


def test_a_link_and_a_files_permissions_stay_when_it_is_written_anew(tmp_path: Path) -> None:
    older, link = tmp_path / "older", tmp_path / "link"
    older.touch(mode=0o640)
    link.symlink_to(older)
    Trace(1).save(link)
    assert link.is_symlink() and older.stat().st_mode & 0o777 == 0o640
    assert Trace.load(older) == Trace(1)


def test_a_path_that_is_no_files_is_refused(tmp_path: Path) -> None:
    trace = simulate("iterative", stages=1, max_new_tokens=2).trace
    for call in (trace.save, trace.to_perfetto, Trace.load):
        with pytest.raises(ValueError, match="expected the path of a file, got the directory"):
            call(tmp_path)
        with pytest.raises(ValueError, match="expected the path of a file, got None"):
            call(None)  # type: ignore[arg-type]
