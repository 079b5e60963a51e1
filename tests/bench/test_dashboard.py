"""What the dashboard's benchmark makes of what it measures."""

from __future__ import annotations

import random

import pytest

from pipeinfer_dask.bench.dashboard import confidence, idle_row, report_of
from pipeinfer_dask.bench.limits import check


def test_the_interval_holds_the_median_of_what_was_drawn_from_nineteen_times_in_twenty() -> None:
    luck = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = confidence([luck.expovariate(1.0) for _ in range(60)])
        held += low < 0.6931 < high  # the logarithm of 2
    assert 0.93 < held / 2000 < 0.98


def test_of_few_values_the_interval_is_all_of_them() -> None:
    assert confidence([3.0]) == (3.0, 3.0)
    assert confidence([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_one_click_beyond_the_bound_breaks_it() -> None:
    quick = idle_row([0.003] * 60)
    kept = report_of([quick, idle_row([0.003] * 59 + [0.05])])
    assert kept["within"] == {"idle_ms_max": True}
    check(kept)
    broken = report_of([idle_row([0.003] * 59 + [0.0502]), quick])
    with pytest.raises(RuntimeError, match=r"idle_ms_max of at most 50, got 50\.2"):
        check(broken)
