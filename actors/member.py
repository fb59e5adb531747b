"""One place in the fleet, whichever process has it."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import RLHFError
from rlhf.health import Health


@dataclass(eq=False)
class Member:
    """`handle` is its present process, None while there is none; `streams` are what that works on."""

    name: str
    handle: Any
    health: Health
    streams: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Is there a process?"""
    catching_up: "asyncio.Future[RLHFError | None] | None" = None
    """What brings the process to the served version."""
    tokens: int | None = None
    proof: int | None = None
    """The version that the process has proved in its answer to an update, until it is admitted with it."""
