"""What is asked of an engine is checked before anything is opened."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeinfer_dask.runtime.planning.opening import check_recovery

GOOD: dict[str, Any] = {
    "spares": 0,
    "max_recoveries": 5,
    "recovery_timeout": 300,
    "node_timeout": 15.0,
    "move_in_after": 0,
}


def test_what_can_be_said_of_losses_is_taken() -> None:
    check_recovery(**GOOD)
    check_recovery(**GOOD | {"move_in_after": 60.0, "spares": 2})


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"spares": -1}, "spares as a whole number of at least 0, got -1"),
        ({"max_recoveries": True}, "max_recoveries as a whole number of at least 0, got True"),
        ({"recovery_timeout": 0}, "recovery_timeout as seconds above 0, got 0"),
        ({"node_timeout": math.inf}, "node_timeout as seconds above 0, got inf"),
        ({"node_timeout": 10**400}, "node_timeout as seconds above 0, got 10+"),
        ({"node_timeout": "15"}, "node_timeout as seconds above 0, got '15'"),
        ({"move_in_after": -1}, "move_in_after as seconds from 0 on, got -1"),
        ({"move_in_after": math.nan}, "move_in_after as seconds from 0 on, got nan"),
    ],
)
def test_what_can_not_be_is_refused(asked: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^expected {expected}$"):
        check_recovery(**GOOD | asked)
