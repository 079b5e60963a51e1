import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer_dask.models.layers import balanced_layers, split_layers


def sizes(num_layers: int, stages: int, weights: Sequence[float] | None = None) -> list[int]:
    return [len(share) for share in split_layers(num_layers, stages, weights)]


def test_an_even_split_gives_what_is_left_over_to_the_first_stages() -> None:
    assert split_layers(7, 3) == [range(3), range(3, 5), range(5, 7)]
    assert split_layers(6, 3) == [range(2), range(2, 4), range(4, 6)]


def test_one_stage_holds_every_layer() -> None:
    assert split_layers(5, 1) == [range(5)]


def test_weights_are_relative() -> None:
    assert sizes(12, 3, [1, 2, 3]) == [2, 4, 6]
    assert sizes(12, 3, [10, 20, 30]) == [2, 4, 6]
    assert sizes(8, 2, [1e308, 1e308]) == [4, 4]


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8),
    st.integers(0, 40),
)
def test_the_shares_are_the_whole_model_in_order(weights: list[float], spare: int) -> None:
    num_layers = len(weights) + spare
    shares = split_layers(num_layers, len(weights), weights)
    assert [layer for share in shares for layer in share] == list(range(num_layers))
    assert all(len(share) >= 1 for share in shares)


@pytest.mark.parametrize(
    ("num_layers", "stages", "weights", "message"),
    [
        (2, 3, None, "3 stages need at least 3 layers, but the model has 2"),
        (2, 0, None, "stages as a whole number of at least 1, got 0"),
        (4, 2, [1], "one weight for each of the 2 stages, not [1]"),
        (4, 2, "12", "one weight for each of the 2 stages, not '12'"),
        (4, 2, [1, -1], "above 0 for the layer split, got -1"),
        (4, 2, [1, float("nan")], "above 0 for the layer split, got nan"),
        (4, 2, [1, float("inf")], "above 0 for the layer split, got inf"),
        (4, 2, [0, 0], "above 0 for the layer split, got 0"),
        (4, 2, [1, "2"], "made of numbers, not of '2'"),
        (4, 2, [1, True], "made of numbers, not of True"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(
    num_layers: int, stages: int, weights: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        split_layers(num_layers, stages, weights)


def shares(*speeds: float, head: float = 0.0, most: Sequence[int] = ()) -> list[int]:
    split = balanced_layers(12, speeds, head=head, most=most or [12] * len(speeds))
    assert [layer for layers in split for layer in layers] == list(range(12))
    return [len(layers) for layers in split]


def test_layers_are_shared_out_by_speed() -> None:
    assert shares(1, 1, 1) == [4, 4, 4]
    assert shares(2, 1, 1) == [6, 3, 3]
    assert shares(1, 1000, 1) == [1, 10, 1]


def test_a_head_is_work_of_the_last_stage() -> None:
    assert shares(1, 1, 1, head=3) == [5, 5, 2]
    assert shares(1, 1, 1, head=50) == [6, 5, 1]


def test_memory_limits_what_speed_would_give() -> None:
    assert shares(4, 1, 1, most=[5, 12, 12]) == [5, 4, 3]
    assert shares(4, 1, 1, most=[5, 4, 3]) == [5, 4, 3]


def test_layers_that_have_no_room_are_an_error() -> None:
    with pytest.raises(
        MemoryError, match=r"room for 12 layers, got room for \[5, 4, 0\]: use more"
    ):
        shares(1, 1, 1, most=[5, 4, 0])
    with pytest.raises(ValueError, match="13 stages need at least 13 layers"):
        shares(*[1.0] * 13)
