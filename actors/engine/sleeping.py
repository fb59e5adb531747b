"""An engine's sleep between its turns on a GPU that it shares, through vLLM's sleep mode.

The KV cache is thrown away in any case. Level 1 copies the weights into CPU memory; level 2 drops them too, for an
engine that gets a whole update before it serves again. To wake for an update is done in two steps: the weights first,
and the cache, which takes what is left of the GPU, only when the update is through.
"""

from collections.abc import Collection
from typing import Protocol

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
PARTS = (WEIGHTS, KV_CACHE)

KEEP_WEIGHTS = 1
DROP_WEIGHTS = 2


class SleepMode(Protocol):
    """What is asked of vLLM's AsyncLLM."""

    async def sleep(self, level: int = 1) -> None:
        """Stop what runs and give the GPU's memory back."""
        ...

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """Take the memory of some parts again; scheduling goes on once all have theirs."""
        ...


class Sleeper:
    """Which parts of one engine are asleep."""

    def __init__(self, llm: SleepMode, gpu: bool):
        """Without `gpu` nothing is asked of vLLM, which has no sleep mode on a CPU: only the state is kept."""
        self._llm = llm
        self._gpu = gpu
        self._asleep: set[str] = set()

    @property
    def awake(self) -> bool:
        """Can the engine work?"""
        return not self._asleep

    async def sleep(self, level: int) -> None:
        """Put all parts to sleep; those that sleep already stay as they are."""
        if self._gpu and self._asleep != set(PARTS):
            await self._llm.sleep(level=level)
        self._asleep = set(PARTS)

    async def wake(self, parts: Collection[str] = PARTS) -> None:
        """Wake those of `parts` that are asleep."""
        wanted = [part for part in PARTS if part in parts and part in self._asleep]
        if wanted and self._gpu:
            await self._llm.wake_up(wanted)
        self._asleep.difference_update(wanted)
