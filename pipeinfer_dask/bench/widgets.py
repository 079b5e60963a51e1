"""What a live timeline costs: the kernel's time, bytes on the wire, and frames in the browser.

A recorded generation of many bars goes on in a real JupyterLab: ten times a second a run has
left a pipeline of fifteen stages, and a browser without a screen draws it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pipeinfer_dask.bench.browser import Lab, Tab, chromium, missing, notebook_of
from pipeinfer_dask.bench.limits import judged

BARS = 3000
STAGES = 15
UPDATES = 100
LEAST, MOST = {"fps": 50.0}, {"update_cpu_ms": 0.5, "bytes": 1024}
"""Limits of the report's figures."""

KERNEL = """
import gc, json, pickle, threading, time
import pipeinfer_dask as pi
from pipeinfer_dask.protocol.messages import RunDone
from pipeinfer_dask.widgets import Channel, Timeline

recorded = pi.simulate("adaptive", stages={stages}, acceptance=0.8, max_new_tokens=1500).trace
assert sum(isinstance(what, RunDone) for _, what in recorded) * {stages} > {bars} + 20 * {updates}
kept = [pickle.dumps(entry) for entry in recorded]  # a head's are new, and so are these

gc.collect()
gc.freeze()  # as an engine does: the recorded generation is no part of what is measured

class Replay:
    '''A generation that starts with many bars, and then has a run more in each tenth.'''

    def __init__(self):
        self.trace = pi.Trace({stages})
        self.over = False

    def done(self):
        return self.over

    def grow(self, bars):
        while bars > 0:
            entry = pickle.loads(kept[len(self.trace)])
            self.trace.add(*entry)
            bars -= {stages} * isinstance(entry[1], RunDone)

    def play(self, clock=None):
        self.grow({bars})
        time.sleep(1.0)
        Counted.messages = Counted.sent = 0  # the first bars are not updates
        thread_s = time.clock_gettime(clock) if clock is not None else 0.0
        started = time.process_time()
        for _ in range({updates}):
            self.grow(1)
            time.sleep(0.1)
        self.cpu_s = time.process_time() - started
        self.thread_s = time.clock_gettime(clock) - thread_s if clock is not None else 0.0
        self.over = True

class Counted(Channel):
    messages = sent = 0  # of the class that is named here: a widget's own is made anew

    def send(self, content, buffers=None):
        Counted.messages += 1
        Counted.sent += len(json.dumps(content)) + sum(map(len, buffers))
        super().send(content, buffers)

alone = Replay()
alone.play()
replay = Replay()
timeline = Timeline(Counted(replay, Timeline.shows))
timeline
"""
PLAY = """
def play():
    follower = next(each for each in threading.enumerate() if each.name == "pipeinfer-views")
    replay.play(time.pthread_getcpuclockid(follower.ident))
    figures = {"cpu_s": replay.cpu_s, "alone_s": alone.cpu_s, "thread_s": replay.thread_s}
    figures |= {"messages": Counted.messages, "sent": Counted.sent}
    with open("figures.json", "w") as file:
        json.dump(figures, file)

threading.Thread(target=play).start()
"""
FRAMES = """seconds => new Promise(resolve => {
  const times = [];
  const tick = now => {
    times.push(now);
    if (now - times[0] < 1e3 * seconds) requestAnimationFrame(tick);
    else resolve((times.length - 1) / ((now - times[0]) / 1e3));
  };
  requestAnimationFrame(tick);
})"""


def run_widgets_bench(updates: int = UPDATES) -> dict[str, Any]:
    """Measure a live timeline in JupyterLab and Chromium.

    Parameters
    ----------
    updates : int
        Of a tenth of a second each.

    Returns
    -------
    dict
        ``{"suite": "widgets", "rows": [{"bars", "nodes", "updates", "updates_per_s",
        "update_cpu_ms", "kernel_cpu_ms", "bytes", "fps", "idle_fps"}]}``: for each update
        milliseconds of processor time, of the thread that follows, packs and sends, and of the
        whole kernel with its sockets beyond what it takes without a view; bytes; and frames a
        second while updates come, and before any. And of these, what has a limit, with
        whether it is ``within``.

    Raises
    ------
    RuntimeError
        If JupyterLab or a browser is not there.
    """
    if (lacking := missing()) is not None:
        raise RuntimeError(lacking)
    with tempfile.TemporaryDirectory() as home:
        lab = Lab(Path(home))
        try:
            with chromium() as browser:
                row = measure(lab, Tab(browser.new_page(), lab.url), updates)
        finally:
            lab.close()
    judgeable = {name: row[name] for name in (*LEAST, *MOST)}
    return judged({"suite": "widgets", **judgeable, "rows": [row]}, least=LEAST, most=MOST)


def measure(lab: Lab, tab: Tab, updates: int) -> dict[str, Any]:
    """Return the row of `run_widgets_bench`."""
    page = tab.page
    kernel = KERNEL.format(stages=STAGES, bars=BARS, updates=updates)
    (lab.notebooks / "bench.ipynb").write_text(notebook_of(kernel, PLAY))
    seconds = 0.08 * updates
    tab.open(lab.address_of("bench.ipynb"))
    idle = page.evaluate(FRAMES, min(3, seconds))
    tab.run_all()
    page.locator("[data-bars]").scroll_into_view_if_needed()  # what nobody sees is not drawn
    page.wait_for_function(f"() => document.querySelector('[data-bars]')?.dataset.bars >= {BARS}")
    before = int(page.locator("[data-updates]").get_attribute("data-updates") or 0)
    fps = page.evaluate(FRAMES, seconds)
    after = int(page.locator("[data-updates]").get_attribute("data-updates") or 0)
    page.wait_for_selector("[data-complete=true]")
    figures = json.loads((lab.notebooks / "figures.json").read_text())
    if tab.errors:
        raise RuntimeError(f"the page has failed: {tab.errors[0]}")
    messages = figures["messages"]
    return {
        "bars": int(page.locator("[data-bars]").get_attribute("data-bars") or 0),
        "nodes": STAGES + 1,
        "updates": messages,
        "updates_per_s": round((after - before) / seconds, 1),
        "update_cpu_ms": round(1e3 * figures["thread_s"] / messages, 3),
        "kernel_cpu_ms": round(1e3 * (figures["cpu_s"] - figures["alone_s"]) / messages, 3),
        "bytes": round(figures["sent"] / messages),
        "fps": round(fps, 1),
        "idle_fps": round(idle, 1),
    }
