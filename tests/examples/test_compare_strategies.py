"""The comparison of strategies saves what it says."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import pipeinfer_dask as pi
from tests.examples.conftest import Load

pytest.importorskip("matplotlib", reason="needs '.[examples]'")


def test_comparison_saves_a_plot_and_a_timeline_and_a_trace_of_each_strategy(
    example: Load, tmp_path: Path
) -> None:
    main = example("compare_strategies").main
    ran = CliRunner().invoke(main, [str(tmp_path), "--max-new-tokens", "12", "--in-process"])
    assert ran.exit_code == 0, ran.output
    assert "<svg" in (tmp_path / "tokens.svg").read_text()
    for name in ("iterative", "speculative", "pipeinfer", "adaptive"):
        assert pi.Trace.load(tmp_path / f"{name}.trace").metrics().generated_tokens == 12
        assert "<img" in (tmp_path / f"{name}.html").read_text()


def test_a_draft_of_ones_own_is_taken_though_the_target_is_the_embedded_one(
    example: Load, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    main = example("compare_strategies").main
    ran = CliRunner().invoke(main, [str(tmp_path), "--draft", nowhere, "--in-process"])
    assert nowhere in str(ran.exception)
