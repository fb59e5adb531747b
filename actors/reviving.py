"""Starting an actor again in place of one that died, out of the restart budget."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import ray

from actors.calls import first_line
from rlhf.errors import RLHFError
from rlhf.health import Health, RestartBudget, State

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
"""Before a start is tried again: what made it fail, such as memory that is not free yet, may pass."""


async def revive(
    name: str,
    health: Health,
    budget: RestartBudget,
    start: Callable[[], Awaitable[Any]],
    alert: Callable[[str], None],
) -> Any:
    """Start a DEAD actor until it is there: returns its handle, STALE; None, RETIRED, if the budget is spent first.

    Each restart is told to `alert` with its reason.
    """
    pause = 0.0
    while health.state == State.DEAD:
        reason = health.reason
        if not health.begin_restart():
            health.retire(f"{reason}; the restarts are spent (cluster.restarts: {budget})")
            alert(f"{name} is gone for good: {health.reason}")
            return None
        alert(f"{name} is started again: {reason} (restarts left: {budget.left()})")
        await asyncio.sleep(pause)
        try:
            handle = await start()
        except (RLHFError, ray.exceptions.RayError) as error:
            health.died(f"could not be started: {first_line(error)}")
            pause = min(LONGEST_PAUSE_S, 2 * pause or FIRST_PAUSE_S)
        else:
            health.restarted()
            return handle
    return None
