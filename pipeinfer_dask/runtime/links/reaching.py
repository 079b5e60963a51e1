"""A connection to a Dask worker or scheduler, within a time."""

from __future__ import annotations

import asyncio
from typing import Any

from distributed.comm import Comm, connect


async def reach(address: str, timeout_s: float, **arguments: Any) -> Comm:
    """Connect to a server of Dask's.

    Parameters
    ----------
    address : str
    timeout_s : float, seconds
        Holds for the server's first words, too. Dask itself waits for those without a limit, and a
        process that hangs never says them: the system takes connections for it.
    **arguments
        For `distributed.comm.connect`.

    Raises
    ------
    OSError
        Nobody is there, or says a word in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            comm: Comm = await connect(address, timeout_s, **arguments)
            return comm
    except TimeoutError:
        raise TimeoutError(f"it says nothing for {timeout_s:g} s") from None
