"""`adaptive` where draft model and stages compute on the same cores: they take turns."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest

from pipeinfer_dask.policies import Adaptive
from pipeinfer_dask.protocol.messages import Drafted, Event, Origin
from tests.core.invariants import validate
from tests.core.world import World


class Shared(World):
    """A world with a clock, that looks on after each event."""

    clock = 0.0
    most = 0
    together = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.drafted: list[int] = []
        super().__init__(*arguments, **options)

    def tell(self, event: Event) -> None:
        self.clock += 1.0
        if isinstance(event, Drafted):
            self.drafted.append(len(event.proposals))
        for command in self.machine.handle(event, self.clock):
            self._carry_out(command)
        validate(self.machine)
        if not self.machine.prefilling:
            self.most = max(self.most, len(self.machine.runs))
            self.together += bool(self.machine.runs) and self.machine.drafting


@pytest.mark.parametrize("quality", [0.0, 0.7, 1.0])
def test_one_run_or_one_draft_is_under_way_at_a_time(quality: float) -> None:
    accepted = 0
    for seed in range(10):
        world = Shared(Adaptive(), quality=quality, max_new_tokens=60, spare=60, shares_cores=True)
        world.run(random.Random(seed).randrange)
        assert world.finished == "length"
        assert (world.most, world.together) == (1, 0)
        accepted += world.origins.count(Origin.ACCEPTED)
    assert (accepted > 100) == (quality > 0)


def test_drafts_are_deeper_the_more_often_they_are_right() -> None:
    depths = []
    for quality in (0.0, 1.0):
        world = Shared(
            Adaptive(tree=False), quality=quality, max_new_tokens=80, spare=80, shares_cores=True
        )
        world.run()
        depths.append(statistics.mean(world.drafted[-6:-1]))
    assert depths[0] + 1 < depths[1]


def test_without_slots_to_spare_it_decodes_plainly() -> None:
    world = Shared(Adaptive(), spare=0, shares_cores=True)
    world.run()
    assert world.finished == "length"
    assert set(world.origins) == {Origin.PLAIN}
