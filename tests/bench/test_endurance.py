"""The benches of what may go wrong: small, but on real processes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from click.testing import CliRunner
from distributed import Scheduler, Worker

from pipeinfer_dask.bench.cancels import run_cancels_bench
from pipeinfer_dask.bench.faults import run_faults_bench
from pipeinfer_dask.bench.limits import check, judged
from pipeinfer_dask.bench.sabotage import Saboteur
from pipeinfer_dask.bench.soak import run_soak_bench
from pipeinfer_dask.cli import main
from tests.clusters import client_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def test_bench_faults_says_what_was_done_and_that_no_token_was_lost() -> None:
    report = run_faults_bench(faults=2, generations=1, seed=1, kinds=("kill", "repeat"))
    json.dumps(report)
    assert (report["suite"], report["faults"], report["generations"]) == ("faults", 2, 1)
    assert (report["identical"], report["tokens_lost"]) == (1, 0)
    assert report["interrupted"] is None
    assert (report["leaks"], report["false_alarms"]) == (0, 0)
    assert report["limits"]["recovery_s_p50"] == "at most 3"
    assert all(report["within"][name] for name in ("identical", "tokens_lost", "leaks"))
    rows = {row["kind"]: row for row in report["rows"]}
    assert rows["kill"]["faults"] + rows["repeat"]["faults"] == 2
    for row in rows.values():
        assert row["prefill"] + row["mid-text"] + row["recovering"] == row["faults"]


def test_what_dask_keeps_open_to_ask_again_is_no_leak() -> None:
    async def ask_at_once(dask_worker: Worker) -> None:
        await asyncio.gather(*(dask_worker.scheduler.identity() for _ in range(3)))

    async def be_asked_at_once(dask_scheduler: Scheduler) -> None:
        (worker,) = dask_scheduler.workers
        await asyncio.gather(*(dask_scheduler.rpc(worker).identity() for _ in range(3)))

    with client_of(1, processes=True) as client:
        saboteur = Saboteur(client)
        before = saboteur.files()
        client.run(ask_at_once)
        client.run_on_scheduler(be_asked_at_once)
        assert saboteur.files() == before


def test_bench_faults_reports_a_text_that_was_interrupted() -> None:
    report = run_faults_bench(faults=1, generations=1, seed=1, kinds=("cut",), recoveries=0)
    json.dumps(report)
    assert "is cut off" in report["interrupted"]
    assert (report["identical"], report["leaks"]) == (0, 0)
    assert report["tokens_lost"] > 0
    with pytest.raises(RuntimeError, match="expected identical of at least 1, got 0; tokens_lost"):
        check(report)


def test_bench_soak_watches_every_process() -> None:
    report = run_soak_bench(generations=14, warm=4, every=3)
    json.dumps(report)
    assert (report["generations"], report["identical"], report["held"]) == (14, 14, 0)
    assert report["cancelled"] > 0
    assert len(report["rows"]) == 5  # client, scheduler, workers
    for row in report["rows"]:
        assert row["looks"] >= 3
        assert row["mib"] > 10
    assert report["within"]["identical"] and report["within"]["held"]


def test_bench_cancels_times_the_stages_and_holds_what_comes_next_against_plain_decoding() -> None:
    report = run_cancels_bench(cancels=4)
    json.dumps(report)
    assert (report["cancels"], report["held"]) == (4, 0)
    assert report["right"] == report["started"] >= 4
    assert sum(row["cancels"] for row in report["rows"]) == 4
    assert report["within"]["right"]
    assert 0 <= report["idle_ms_p50"] <= report["idle_ms_p95"] <= report["idle_ms_max"]


FIGURES: dict[str, Any] = {"suite": "hop", "rows": [], "right": 9, "idle_ms": 50.0, "held": None}


def test_a_report_says_which_limits_are_kept() -> None:
    report = judged(FIGURES, least={"right": 10}, most={"idle_ms": 50, "held": 0})
    assert report["limits"]["right"] == "at least 10"
    assert report["limits"]["idle_ms"] == "at most 50"
    assert report["within"] == {"right": False, "idle_ms": True, "held": None}


@pytest.mark.parametrize(("least", "status"), [(9, 0), (10, 1)])
def test_a_bench_with_a_broken_limit_fails_and_names_it(
    monkeypatch: pytest.MonkeyPatch, least: int, status: int
) -> None:
    report = judged(FIGURES, least={"right": least}, most={"held": 0})
    monkeypatch.setattr("pipeinfer_dask.bench.hop.run_hop_bench", lambda: report)
    ran = CliRunner().invoke(main, ["bench", "hop", "--json"])
    assert ran.exit_code == status
    assert json.loads(ran.stdout) == report
    broken = "Error: expected right of at least 10, got 9: see the rows of the report\n"
    assert ran.stderr == (broken if status else "")


@pytest.mark.parametrize(
    ("suite", "option"), [("hop", "--faults"), ("faults", "--cancels"), ("soak", "--faults")]
)
def test_a_bench_has_its_own_options_and_no_others(suite: str, option: str) -> None:
    ran = CliRunner().invoke(main, ["bench", suite, option, "3"])
    assert ran.exit_code == 2
    assert ran.stderr == f"Error: expected options of suite {suite}, got {option}: leave it out\n"


def test_a_bench_can_not_be_told_to_do_less_than_nothing() -> None:
    ran = CliRunner().invoke(main, ["bench", "faults", "--faults", "-1"])
    assert ran.exit_code == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "--faults" in ran.stderr
