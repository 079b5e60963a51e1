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
