"""A page that misses an update: what it takes of the next one, without a lab and a kernel."""

from __future__ import annotations

from base64 import b64encode
from importlib.resources import files
from itertools import pairwise
from typing import Any

import pytest

from pipeinfer_dask.widgets.channel import HEAD, PART
from tests.widgets.test_feed import TRACE, Growing, Recorded

pytestmark = pytest.mark.browser

OPEN = """about => {
  const heard = {};
  const channel = {
    get: name => ({ about, complete: false })[name],
    on: (event, handler) => { heard[event] = handler; },
    send: () => { window.asked += 1; },
  };
  window.asked = 0;
  window.story = new Story(channel);
  window.take = coded => {
    const bytes = Uint8Array.from(atob(coded), letter => letter.charCodeAt(0));
    heard["msg:custom"]({ kind: "rows" }, [new DataView(bytes.buffer)]);
  };
}"""
STATE = """() => [
  window.asked,
  Object.fromEntries(Object.entries(story.tables).map(([name, table]) => [name, table.count])),
]"""


def tables_in(channel: Recorded, message: bytes) -> list[str]:
    """Return of which tables a message has rows, in order."""
    found, at = [], HEAD.size
    while at < len(message):
        number, _, rows, texts = PART.unpack_from(message, at)
        found.append(channel.tables[number])
        at += PART.size + rows + texts
    return found


def test_of_an_update_that_does_not_follow_the_last_one_nothing_is_taken(browser: Any) -> None:
    source = Growing(TRACE)
    channel = Recorded(source)
    feed = channel.feed
    with feed.lock:
        for upto in range(0, len(TRACE) // 2, 4):
            source.grow(upto)
            if feed.history.update():
                channel.push()
        sent = list(channel.sent)
        channel._asked(channel, {"kind": "resync"}, [])
        whole = channel.sent[-1]
        counts = {name: feed.count(name) for name in channel.tables}
    source.end()
    # Of an update whose forerunner is lost, the first table goes on and a later one does not.
    lost = next(
        number
        for number, (before, after) in enumerate(pairwise(sent))
        if number > 20
        for had, has in [(tables_in(channel, before), tables_in(channel, after))]
        if has and has[0] not in had and set(has[1:]) & set(had)
    )
    page = browser.new_page()
    page.add_script_tag(content=(files("pipeinfer_dask.widgets") / "static/common.js").read_text())
    page.evaluate(OPEN, channel.about)
    for message in sent[:lost]:
        page.evaluate("coded => take(coded)", b64encode(message).decode())
    asked, before = page.evaluate(STATE)
    assert asked == 1 and before["guesses"] > 0  # a page that is new asks for all
    page.evaluate("coded => take(coded)", b64encode(sent[lost + 1]).decode())
    assert page.evaluate(STATE) == [2, before]
    page.evaluate("coded => take(coded)", b64encode(whole).decode())
    assert page.evaluate(STATE) == [2, counts]
    page.close()
    assert feed.wait(30)
