"""The bench of the picks, on a small vocabulary and a short text."""

from __future__ import annotations

import json

from pipeinfer_dask.bench.sampling import SETTINGS, run_sampling_bench


def test_picks_are_timed_beside_those_of_transformers_and_noise_is_shared_to_a_purpose() -> None:
    report = run_sampling_bench(vocabulary=500, repeats=3, temperatures=(1.0,), tokens=40)
    assert [row["settings"] for row in report["rows"]] == list(SETTINGS)
    assert all(row["ms"] > 0 and row["transformers_ms"] > 0 for row in report["rows"])
    (agreement,) = report["agreement"]
    assert agreement["independent"] < agreement["shared"]
    assert agreement["independent"] < agreement["at_most"] <= 1
    json.dumps(report)
