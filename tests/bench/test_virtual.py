"""The benches in virtual time, on small grids."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeinfer_dask.bench.ablation import OFF, run_ablation_bench
from pipeinfer_dask.bench.head import run_head_bench
from pipeinfer_dask.bench.policies import CONTENDERS, Job, measure, run_policies_bench


def test_the_grid_has_a_row_for_each_pipeline_with_every_strategy_in_its_order() -> None:
    report = run_policies_bench((4,), (0.66,), (0.05, 0.3), seeds=1, tokens=120)
    assert report["suite"] == "policies"
    assert [(row["stages"], row["token_cost"]) for row in report["rows"]] == [(4, 0.05), (4, 0.3)]
    for row in report["rows"]:
        assert set(CONTENDERS) <= set(row)
        assert row["iterative"] < row["speculative"] < row["pipeinfer"]
        assert row["adaptive"] > row["speculative_tree"]
        assert row["adaptive"] >= 0.85 * row["bound"]
        assert row["clairvoyant"] > row["adaptive"]
        assert row["ttft"]["adaptive"] <= row["ttft"]["iterative"]
        assert row["itl_p95"]["adaptive"] < row["itl_p95"]["speculative"]
        assert row["settings"]["speculative"]["k"] >= 1
    assert report["summary"]["adaptive / speculative"]["geometric_mean"] > 1.3
    json.dumps(report)


def test_a_baselines_best_setting_is_found_on_a_short_text_and_counts_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeinfer_dask.bench.policies.TRIED_TOKENS", 60)
    (row,) = run_policies_bench((2,), (0.66,), (0.3,), seeds=1, tokens=80)["rows"]
    for column in ("speculative", "pipeinfer"):
        speeds = {}
        for knobs in CONTENDERS[column][1]:
            job = Job(2, 0.66, 0.3, column, tuple(knobs.items()), seeds=1, tokens=80)
            speeds[measure(job).tokens_per_s] = knobs
        assert row[column] == round(max(speeds), 4)
        assert row["settings"][column] == speeds[max(speeds)]


def test_a_text_that_is_not_the_targets_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(2, 0.5, 0.05, "iterative", (), seeds=1, tokens=20)
    measure(job)
    monkeypatch.setattr(
        "pipeinfer_dask.bench.policies.PROMPT_TOKENS", 17
    )  # as if the text began elsewhere
    with pytest.raises(RuntimeError, match="another text than the target's"):
        measure(job)


def test_the_ablation_switches_off_one_mechanism_at_a_time() -> None:
    report = run_ablation_bench((4,), overconfidence=(0.0,), seeds=1, tokens=100)
    rows = {(row["strategy"], row["without"]): row for row in report["rows"]}
    assert list(rows) == [(strategy, without) for strategy, without, _ in OFF]
    assert rows["pipeinfer", ""]["ratio"] == 1
    assert rows["pipeinfer", "asynchronous"]["ratio"] < 1
    assert rows["pipeinfer", "cancellation"]["wasted"] > rows["pipeinfer", ""]["wasted"] > 0
    assert rows["iterative", ""]["wasted"] == 0
    assert rows["adaptive", "tree"]["ratio"] < 1
    json.dumps(report)


def test_the_head_is_measured_with_as_many_live_nodes_as_the_pipeline_holds() -> None:
    setups: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("pipeinfer", 2, {}),
        ("adaptive", 8, {"micro_batch": 8}),
    )
    small, large = run_head_bench(setups, tokens=200)["rows"]
    assert large["live_nodes"] > 3 * small["live_nodes"]
    for row in (small, large):
        assert 0 < row["event_us_p50"] <= row["event_us_p99"]
        assert row["events"] > 20
