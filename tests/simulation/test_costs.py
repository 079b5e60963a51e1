"""The cost model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeinfer_dask.simulation import Costs, Curve, NodeDescription, costs_of_nodes


def test_a_line_adds_the_same_for_each_token() -> None:
    curve = Curve.line(2.0, 0.25)
    assert [curve(n) for n in (1, 2, 5, 100)] == pytest.approx([2.0, 2.5, 4.0, 51.5])


def test_a_measured_curve_goes_on_as_its_end_did() -> None:
    curve = Curve((1.0, 1.1, 1.4))
    assert [curve(n) for n in (1, 2, 3, 5)] == pytest.approx([1.0, 1.1, 1.4, 2.0])
    assert Curve((3.0,))(10) == 3.0
    assert Curve((3.0, 2.0))(10) == 2.0  # measured times may fall, but never below zero


@pytest.mark.parametrize("tokens", [1, 2, 9, 10, 11, 12, 13, 40, 500])
def test_a_roofline_is_the_larger_of_reading_and_arithmetic(tokens: int) -> None:
    assert Curve.roofline(1.0, 0.1)(tokens) == pytest.approx(max(1.0, 0.1 * tokens))


def test_nodes_are_described_by_their_data_sheets() -> None:
    laptop = NodeDescription(memory_bandwidth=100e9, flops=1e12)
    server = NodeDescription(memory_bandwidth=200e9, flops=4e12)
    costs = costs_of_nodes(
        [laptop, server],
        weight_bytes=20e9,
        draft_node=laptop,
        draft_weight_bytes=1e9,
        hop_s=1e-3,
    )
    slow, fast = costs.stages
    assert slow(1) == pytest.approx(0.1)  # 10 GB at 100 GB/s
    assert fast(1) == pytest.approx(0.05)
    assert slow(50) == pytest.approx(0.5)  # 5 billion weights, 2 operations each, 50 tokens
    assert costs.draft(1) == pytest.approx(0.01)


def test_costs_are_given_relative_to_a_stage() -> None:
    costs = Costs.even(3, stage_s=0.1, token_cost=0.5, draft_cost=0.2, hop_cost=0.01)
    assert [stage(3) for stage in costs.stages] == pytest.approx([0.2] * 3)
    assert costs.draft(1) == pytest.approx(0.02)
    assert costs.hop_s == pytest.approx(0.001)
    assert costs.hop(10) == 0


def test_bytes_occupy_a_link_by_its_bandwidth() -> None:
    costs = Costs.even(2, bandwidth=1e6, token_bytes=1000)
    assert costs.hop(5) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 0}, "expected stages as a whole number from 1 to 1024, got 0"),
        ({"stages": 2.5}, "expected stages as a whole number"),
        ({"stage_s": "x"}, "expected stage_s above 0 seconds, got 'x'"),
        ({"stage_s": 0}, "expected stage_s above 0 seconds, got 0"),
        ({"token_cost": -0.1}, "expected token_cost as a share of at least 0, got -0.1"),
        ({"draft_cost": math.nan}, "expected draft_cost"),
        ({"hop_cost": math.inf}, "expected hop_cost"),
        ({"bandwidth": 0}, "expected a bandwidth above 0"),
        ({"token_bytes": -1}, "expected token_bytes of at least 0"),
        ({"layers": 0}, "at least 1 layer"),
    ],
)
def test_costs_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Costs.even(**{"stages": 4} | arguments)


@pytest.mark.parametrize("seconds", [(), (-1.0,), (1.0, math.nan)])
def test_a_curve_of_no_times_is_refused(seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected the seconds of a pass"):
        Curve(seconds)
