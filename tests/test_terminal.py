from io import StringIO

import pytest
from rich.console import Console

from pipeinfer_dask.runtime.nodes.loading import Loading
from pipeinfer_dask.terminal import loading

STEPS = (
    Loading("stage 0", "a", 1 << 20, 4 << 20, stands=False),
    Loading("drafter", "b", 0, 0, stands=True),
)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_a_bar_with_the_bytes_of_each_model_and_a_file_none(
    terminal: bool,
) -> None:
    shown = StringIO()
    with loading(Console(file=shown, force_terminal=terminal, width=100)) as tell:
        for step in STEPS:
            tell(step)
    assert ("stage 0" in shown.getvalue()) is terminal
    assert ("1.0/4.0 MiB" in shown.getvalue()) is terminal
    assert ("drafter" in shown.getvalue()) is terminal
