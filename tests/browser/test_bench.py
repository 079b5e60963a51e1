"""The benchmarks of the views: that they measure what they say, not what they find."""

from __future__ import annotations

from typing import Any

import pytest

from pipeinfer_dask.bench.browser import Lab, Tab
from pipeinfer_dask.bench.dashboard import measure_cancels, measure_pairs
from pipeinfer_dask.bench.widgets import BARS, measure

pytestmark = pytest.mark.browser


def test_a_live_timeline_is_measured(lab: Lab, browser: Any) -> None:
    page = browser.new_page()
    tab = Tab(page, lab.url)
    row = measure(lab, tab, updates=15)
    page.close()
    assert tab.foreign == []
    assert row["bars"] >= BARS and row["nodes"] == 16
    assert 10 <= row["updates"] <= 17
    assert 100 < row["bytes"] <= 1024
    assert all(row[name] > 0 for name in ("update_cpu_ms", "fps", "idle_fps", "updates_per_s"))


def test_what_a_dashboard_costs_and_how_soon_it_cancels_are_measured(
    lab: Lab, browser: Any
) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 1600})
    tab = Tab(page, lab.url)
    (slower,) = measure_pairs(lab, tab, 1, in_process=True)
    (idle_s,) = measure_cancels(lab, tab, 1, in_process=True)
    page.close()
    assert tab.foreign == []
    assert -0.9 < slower < 9  # what it costs is for a quiet machine to say
    assert -1 < idle_s < 5  # negative, if the last run had passed when the click came
