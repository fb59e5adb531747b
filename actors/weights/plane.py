"""The weight plane: one manifest to many generators, each of which checks, loads and proves it."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from actors.calls import within
from actors.fleet import GeneratorFleet
from rlhf.errors import EngineLostError, PayloadError, RLHFError
from rlhf.records import SyncReport, WeightManifest

Outcomes = dict[str, float | RLHFError]
"""What became of each target: the error of its probe, or why it does not serve the version."""


class Plane(ABC):
    """The `WeightPlane` port, but for how the bytes travel."""

    def __init__(self, fleet: GeneratorFleet, verify: bool, tolerance: float, deadline: float):
        self._fleet = fleet
        self._verify = verify
        self._tolerance = tolerance
        self._deadline = deadline
        self._lost: set[str] = set()
        self._published: dict[str, str] = {}

    async def publish(self, manifest: WeightManifest, targets: Sequence[str]) -> SyncReport:
        """Deliver a version; raises `RLHFError` if no target serves it.

        A payload refused before the engine was touched is sent once more. An engine that was lost while loading is
        replaced by a new one, which gets the whole payload; it is never tried again as it is.
        """
        started = time.monotonic()
        await self._replace(self._lost.intersection(targets))
        outcomes = await self._transfer(manifest, targets)
        again = [target for target in targets if isinstance(outcomes[target], RLHFError)]
        if again:
            await self._replace(_lost(outcomes))
            outcomes |= await self._transfer(manifest, again)
            self._lost |= _lost(outcomes)
        served = {target: outcome for target, outcome in outcomes.items() if isinstance(outcome, float)}
        failed = {target: str(outcome) for target, outcome in outcomes.items() if target not in served}
        if not served:
            raise RLHFError(f"no generator took version {manifest.version}: " + "; ".join(failed.values()))
        seconds, worst = time.monotonic() - started, max(served.values())
        changed = manifest.changed_fraction(self._published)
        self._published = manifest.checksums()
        return SyncReport(manifest.version, seconds, manifest.nbytes, tuple(served), failed, worst, changed)

    async def _replace(self, targets: set[str]) -> None:
        await asyncio.gather(*(self._fleet.replace(target) for target in targets))
        self._lost -= targets

    @abstractmethod
    async def _transfer(self, manifest: WeightManifest, targets: Sequence[str]) -> Outcomes:
        """Try each target once: `PayloadError` leaves its engine as it was, `EngineLostError` calls for another."""


class ObjectStorePlane(Plane):
    """Packed buffers lie in Ray's object store and every node fetches them once; each target takes them by itself."""

    async def _transfer(self, manifest: WeightManifest, targets: Sequence[str]) -> Outcomes:
        outcomes = await asyncio.gather(*(self._update(manifest, target) for target in targets))
        return dict(zip(targets, outcomes, strict=True))

    async def _update(self, manifest: WeightManifest, target: str) -> float | RLHFError:
        what = f"{target}: update to version {manifest.version}"
        call = self._fleet.handle(target).update.remote(manifest, self._verify, self._tolerance)
        try:
            return await within(call, self._deadline, what)
        except (PayloadError, EngineLostError) as error:
            return error
        except RLHFError as error:
            # It died or did not answer in time: nobody knows what it holds.
            return EngineLostError(str(error))


def _lost(outcomes: Mapping[str, float | RLHFError]) -> set[str]:
    return {target for target, outcome in outcomes.items() if isinstance(outcome, EngineLostError)}
