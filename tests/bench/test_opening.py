"""The benchmarks of opening an engine and of its first token, in small."""

import pytest

from pipeinfer_dask.bench.open import run_open_bench
from pipeinfer_dask.bench.ttft import PROMPT_TOKENS, run_ttft_bench
from pipeinfer_dask.policies import STRATEGIES

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]


def test_opening_is_timed_beside_links_alone_and_the_last_row_has_the_medians() -> None:
    report = run_open_bench(layers=4, stages=2, rounds=1)
    one, medians = report["rows"]
    assert one["links_s"] > 0
    assert one["open_s"] > 0
    assert medians == {**one, "round": None}


def test_each_strategys_first_token_is_timed_beside_that_of_plain_decoding() -> None:
    rows = run_ttft_bench(rounds=1)["rows"]
    assert [(row["prompt_tokens"], row["strategy"]) for row in rows] == [
        (length, strategy) for length in PROMPT_TOKENS for strategy in STRATEGIES
    ]
    assert all(row["ttft_ms_p50"] > 0 for row in rows)
    assert [row["ratio"] for row in rows if row["strategy"] == "iterative"] == [1.0, 1.0]
