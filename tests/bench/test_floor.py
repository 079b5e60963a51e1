"""The bare chain of relays that a hop is held against: it ends, whatever becomes of it."""

from __future__ import annotations

import asyncio
import gc

import psutil
import pytest

from pipeinfer_dask.bench.floor import Floor


def relays() -> int:
    """Return how many processes of this one's are relays."""
    children = psutil.Process().children()
    return sum("pipeinfer_dask.bench.floor" in child.cmdline() for child in children)


def test_a_message_goes_through_all_relays_and_they_end() -> None:
    async def main() -> None:
        floor = await Floor.open(2)
        assert relays() == 2
        assert await floor.pass_on(b"a message") == b"a message"
        await floor.close()
        assert relays() == 0

    asyncio.run(main())


def test_a_chain_that_does_not_start_in_time_leaves_no_process_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeinfer_dask.bench.floor.PATIENCE_S", 0.05)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await Floor.open(20)
        assert relays() == 0

    asyncio.run(main())


def test_a_chain_that_is_given_up_while_it_starts_leaves_no_connection_open() -> None:
    async def main() -> None:
        opening = asyncio.create_task(Floor.open(20))
        while relays() < 2:  # noqa: ASYNC110 -- then the first one has connected
            await asyncio.sleep(0.01)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    asyncio.run(main())
    gc.collect()  # what is still open complains as it goes
