"""The compute benchmark, small: every contender really generates."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from pipeinfer_dask.bench.compute import run_compute_bench
from pipeinfer_dask.cli import main
from pipeinfer_dask.policies import STRATEGIES


@pytest.mark.slow
def test_all_contenders_generate_the_same_and_are_compared() -> None:
    report = run_compute_bench(dial=(50,), quick=True)
    rows = report["rows"]
    ours = [row for row in rows if row["runner"] == "ours"]
    assert {row["strategy"] for row in ours} == {*STRATEGIES}
    assert {row["draft"] for row in ours} == {"none", "model", "ngram"}
    peers = [row for row in rows if row not in ours]
    assert [row["strategy"] for row in peers] == ["plain", "assisted", "lookup"]
    for row in rows:
        assert row["tokens_per_s"] > 0
        # 16 bits may choose another token, and then the text goes another way.
        assert row["same_tokens"] == 1 or row["runner"] == "transformers bfloat16"
    best = {
        who: max(row["tokens_per_s"] for row in of) for who, of in (("ours", ours), ("", peers))
    }
    assert report["ratio"]["50%"] == pytest.approx(best["ours"] / best[""])  # of one round
    assert report["agreement"]["50%"] == pytest.approx(0.5, abs=0.06)


def test_only_this_suite_has_a_dial() -> None:
    ran = CliRunner().invoke(main, ["bench", "hop", "--dial", "80"])
    assert ran.exit_code == 2
    assert ran.stderr == "Error: expected options of suite hop, got --dial: leave it out\n"
