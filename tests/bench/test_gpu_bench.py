import pytest

from pipeinfer_dask.bench.gpu import run_gpu_bench
from pipeinfer_dask.runtime.planning.gpus import gpu_count


@pytest.mark.skipif(gpu_count() > 0, reason="says what a machine without a GPU says")
def test_a_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^expected a GPU that torch can use, got none: run this"):
        run_gpu_bench()


def test_ours_and_transformers_generate_with_the_same_weights() -> None:
    report = run_gpu_bench(
        "cpu",
        hidden_size=32,
        intermediate_size=64,
        layers=3,
        draft_layers=1,
        head_dim=8,
        context=64,
        vocab_size=300,
        dtype="float32",
        prompt_tokens=8,
        new_tokens=8,
        repeats=1,
    )
    assert (report["suite"], report["device"]) == ("gpu", "cpu")
    assert [row["how"] for row in report["rows"]] == [
        *("generate", "assisted"),
        *("iterative", "speculative", "pipeinfer", "adaptive"),
    ]
    assert all(row["same_tokens"] == 8 for row in report["rows"])
    assert all(row["tokens_per_s"] > 0 for row in report["rows"])
