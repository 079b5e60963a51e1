"""The benches on emulated stages: small, but real processes and links."""

import json
import math
from typing import Any

import pytest

from pipeinfer_dask.bench.load import run_load_bench
from pipeinfer_dask.bench.network import run_network_bench
from pipeinfer_dask.bench.paced import run_paced_bench
from pipeinfer_dask.policies import STRATEGIES

pytestmark = pytest.mark.cluster


def check(row: dict[str, Any]) -> None:
    assert row["emulated"] is True
    assert row["stages"] == 2 and row["stage_ms"] == 5 and row["tokens"] == 12
    assert row["hop_ms"] >= 0 and row["ratio_deviation"] >= 0
    for name in STRATEGIES:
        assert row[name] > 0
        deviation = row[name] / row["simulated"][name] - 1
        assert row["deviation"][name] == pytest.approx(deviation)
    assert row["settings"]["speculative"].keys() == {"k"}
    assert row["settings"]["pipeinfer"]["sequences"] == 1


def test_bench_paced_puts_the_simulator_beside_what_it_measures() -> None:
    report = run_paced_bench(stages=(2,), stage_ms=(5,), acceptances=(0.6, 0.8), tokens=12)
    assert json.loads(json.dumps(report)) == report
    assert report["suite"] == "paced"
    assert [row["acceptance"] for row in report["rows"]] == [0.6, 0.8]
    for row in report["rows"]:
        check(row)


def test_bench_network_has_a_row_for_each_network() -> None:
    networks = ((3.0, math.inf), (0.0, 400.0))
    report = run_network_bench(networks, (0.0, 20.0), stages=2, stage_ms=5, tokens=12)
    assert json.loads(json.dumps(report)) == report
    assert report["suite"] == "network"
    far, thin = report["rows"]
    assert far["asked_hop_ms"] == 3 and far["bandwidth_mbit"] is None
    assert thin["bandwidth_mbit"] == 400
    for row in report["rows"]:
        check(row)
    clients = {(row["away_ms"], row["head"]): row for row in report["clients"]}
    assert clients.keys() == {(ms, head) for ms in (0.0, 20.0) for head in ("client", "worker")}
    assert clients[0.0, "client"]["share"] == 1
    # A run takes 10 ms, and 40 more to the client and back.
    assert clients[20.0, "worker"]["share"] > 1.5 * clients[20.0, "client"]["share"]


def test_bench_load_has_a_row_for_each_number_of_requests() -> None:
    report = run_load_bench((1, 3), stages=2, stage_ms=5, tokens=12)
    assert json.loads(json.dumps(report)) == report
    assert report["suite"] == "load"
    one, three = report["rows"]
    assert (one["requests"], one["speedup"], one["spread"]) == (1, 1, 1)
    assert three["requests"] == 3 and three["spread"] >= 1
    assert three["speedup"] == pytest.approx(three["tokens_per_s"] / one["tokens_per_s"])
    assert three["slowest_tokens_per_s"] <= three["fastest_tokens_per_s"]
    assert three["simulated"] > 0 and three["itl_p95_s"] >= 0 and three["emulated"]
