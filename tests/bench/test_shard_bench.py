import pytest

from pipeinfer_dask.bench.shard import run_shard_bench


def test_a_row_tells_both_passes_and_what_they_multiply() -> None:
    report = run_shard_bench(("llama",), (256,), (1, 3), repeats=2)
    assert report["suite"] == "shard"
    assert [(row["family"], row["tokens"]) for row in report["rows"]] == [
        ("llama", 1),
        ("llama", 3),
    ]
    times = ("ours_ms", "linears_ms", "transformers_ms", "transformers_linears_ms", "ratio")
    assert all(row[name] > 0 for row in report["rows"] for name in times)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_neo", "gpt_oss", "llama4_text", "opt"])
def test_families_that_need_settings_of_their_own_are_measured_too(family: str) -> None:
    (row,) = run_shard_bench((family,), (256,), (2,), repeats=1)["rows"]
    assert row["ours_ms"] > 0
    assert (row["overhead_ratio"] is None) == (family not in {"gpt_neo", "opt"})
