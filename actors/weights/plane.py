"""The weight plane: one manifest to many generators, each of which checks, loads and proves it."""

import asyncio
import time
from collections.abc import Sequence

from actors.calls import within
from actors.fleet import GeneratorFleet
from rlhf.errors import EngineLostError, PayloadError, RLHFError
from rlhf.records import SyncReport, WeightManifest


class ObjectStorePlane:
    """The `WeightPlane` port: packed buffers lie in Ray's object store and every node fetches them once."""

    def __init__(self, fleet: GeneratorFleet, verify: bool, tolerance: float, deadline: float):
        self._fleet = fleet
        self._verify = verify
        self._tolerance = tolerance
        self._deadline = deadline

    async def publish(self, manifest: WeightManifest, targets: Sequence[str]) -> SyncReport:
        """Deliver a version; raises `RLHFError` if no target serves it.

        A payload refused before the engine was touched is sent once more. An engine that was lost while loading is
        replaced by a new one, which gets the whole payload; it is never tried again as it is.
        """
        started = time.monotonic()
        outcomes = await asyncio.gather(*(self._deliver(manifest, target) for target in targets))
        served = tuple(target for target, outcome in zip(targets, outcomes, strict=True) if isinstance(outcome, float))
        failed = {
            target: str(outcome)
            for target, outcome in zip(targets, outcomes, strict=True)
            if not isinstance(outcome, float)
        }
        if not served:
            raise RLHFError(f"no generator took version {manifest.version}: " + "; ".join(failed.values()))
        worst = max(outcome for outcome in outcomes if isinstance(outcome, float))
        return SyncReport(manifest.version, time.monotonic() - started, manifest.nbytes, served, failed, worst)

    async def _deliver(self, manifest: WeightManifest, target: str) -> float | RLHFError:
        try:
            return await self._update(manifest, target)
        except PayloadError:
            pass
        except EngineLostError:
            await self._fleet.replace(target)
        try:
            return await self._update(manifest, target)
        except (PayloadError, EngineLostError) as error:
            return error

    async def _update(self, manifest: WeightManifest, target: str) -> float:
        what = f"{target}: update to version {manifest.version}"
        call = self._fleet.handle(target).update.remote(manifest, self._verify, self._tolerance)
        return await within(call, self._deadline, what)
