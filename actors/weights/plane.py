"""The weight plane: one manifest to many generators, each of which checks, loads and proves it."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from actors.calls import NoAnswerError, within
from actors.fleet import GeneratorFleet
from actors.relay import RelayLostError
from rlhf.errors import EngineLostError, PayloadError, RLHFError
from rlhf.records import SyncReport, WeightManifest

RELAY_PAUSE_S = 0.1
"""Before an update is sent again by way of another relay."""

Outcomes = dict[str, float | RLHFError]
"""What became of each target: the error of its probe, or why it does not serve the version."""


class Plane(ABC):
    """The `WeightPlane` port, but for how the bytes travel."""

    resends: bool
    """Can a version be sent again to one target, long after the learner has moved on?"""

    def __init__(self, fleet: GeneratorFleet, verify: bool, tolerance: float, deadline: float):
        self._fleet = fleet
        self._verify = verify
        self._tolerance = tolerance
        self._deadline = deadline
        self._published: dict[str, str] = {}
        # A generator that was started again is brought up between updates, never beside one: it would prove a version
        # that is overtaken meanwhile.
        self._turn = asyncio.Lock()
        self._newest: WeightManifest | None = None
        self._sent_bytes: int | None = None
        self._sent: dict[str, Any] = {}  # the process that each target's last payload went to
        if self.resends:
            fleet.catch_up = self.catch_up

    async def publish(self, manifest: WeightManifest, targets: Sequence[str]) -> SyncReport:
        """Deliver a version; raises `RLHFError` if no target serves it.

        A payload refused before the engine was touched is sent once more. An engine that was lost while loading is
        replaced by a new one, which gets the whole payload; it is never tried again as it is. Targets that are being
        started again are left out; they get the version when they are there.
        """
        started = time.monotonic()
        if not self._running(targets):
            await self._fleet.recovered()
        async with self._turn:
            outcomes = await self._deliver(manifest, self._running(targets))
        served = {target: outcome for target, outcome in outcomes.items() if isinstance(outcome, float)}
        failed = {target: str(outcome) for target, outcome in outcomes.items() if target not in served}
        if not served:
            why = "; ".join(failed.values()) or "none is left"
            raise RLHFError(f"no generator took version {manifest.version}: {why}")
        seconds, worst = time.monotonic() - started, max(served.values())
        changed = manifest.changed_fraction(self._published)
        self._published = manifest.checksums()
        sent = manifest.nbytes if self._sent_bytes is None else self._sent_bytes
        return SyncReport(manifest.version, seconds, sent, tuple(served), failed, worst, changed)

    async def catch_up(self, target: str) -> RLHFError | None:
        """Bring one target to the version that was published last and admit it; returns why it could not."""
        async with self._turn:
            manifest = self._newest
            if manifest is None or self._fleet.has(target, manifest.version):
                return None
            if not self._running([target]):
                return EngineLostError(f"{target}: died while it waited for a version")
            outcome = (await self._send(manifest, [target]))[target]
            if isinstance(outcome, RLHFError):
                return outcome
            await self._fleet.admit(target, manifest.version)
            return None

    async def _deliver(self, manifest: WeightManifest, targets: Sequence[str]) -> Outcomes:
        """Try every target, those that failed once more; who is lost for good is started again in the background."""
        outcomes = await self._send(manifest, targets)
        failed = {target: error for target, error in outcomes.items() if isinstance(error, RLHFError)}
        if self.resends and len(failed) < len(targets):
            # The others can go on with the version; nobody waits for an engine to start.
            again = self._running([target for target, error in failed.items() if not self._abandon(target, error)])
        else:
            again = await self._replace(failed, outcomes)
        if again:
            found = await self._send(manifest, again)
            for target, outcome in found.items():
                self._abandon(target, outcome)
            outcomes |= found
        if self.resends:
            self._newest = manifest
        return outcomes

    async def _send(self, manifest: WeightManifest, targets: Sequence[str]) -> Outcomes:
        """Try each target once; the fleet is told who has proved the version."""
        self._sent |= (handles := {target: self._fleet.handle(target) for target in targets})
        outcomes = await self._transfer(manifest, handles)
        for target, outcome in outcomes.items():
            if isinstance(outcome, float) and not self._fleet.proved(target, manifest.version, handles[target]):
                outcomes[target] = EngineLostError(f"{target}: died once it had proved version {manifest.version}")
        return outcomes

    def _abandon(self, target: str, outcome: float | RLHFError) -> bool:
        """Give up the engine that was sent to, if it was lost; returns whether it was. Another one may be there now."""
        if not isinstance(outcome, EngineLostError):
            return False
        self._fleet.lost(target, str(outcome), self._sent[target])
        return True

    async def _replace(self, failed: Mapping[str, RLHFError], outcomes: Outcomes) -> list[str]:
        """Put new engines in the place of lost ones, now; returns the targets to try again."""
        lost = [target for target, error in failed.items() if isinstance(error, EngineLostError)]
        ends = await asyncio.gather(
            *(self._fleet.replace(target, str(failed[target]), self._sent[target]) for target in lost),
            return_exceptions=True,
        )
        for target, end in zip(lost, ends, strict=True):
            if isinstance(end, RLHFError):
                outcomes[target] = end
            elif isinstance(end, BaseException):
                raise end
        return self._running(list(failed))

    def _running(self, targets: Sequence[str]) -> list[str]:
        running = set(self._fleet.running())
        return [target for target in targets if target in running]

    @abstractmethod
    async def _transfer(self, manifest: WeightManifest, handles: Mapping[str, Any]) -> Outcomes:
        """Try each target once: `PayloadError` leaves its engine as it was, `EngineLostError` calls for another.

        `handles` are the targets' processes. One may die, and another take its place, while this goes on.
        """


class ObjectStorePlane(Plane):
    """Packed buffers lie in Ray's object store and every node fetches them once; each target takes them by itself.

    The buffers of the version published last are kept for generators that are started again.
    """

    resends = True

    async def _transfer(self, manifest: WeightManifest, handles: Mapping[str, Any]) -> Outcomes:
        return await self._update_all(dict.fromkeys(handles, manifest), handles)

    async def _update_all(self, manifests: Mapping[str, WeightManifest], handles: Mapping[str, Any]) -> Outcomes:
        """Send each target its manifest."""
        end = time.monotonic() + self._deadline
        calls = {target: self._call(manifest, handles[target]) for target, manifest in manifests.items()}
        try:
            if calls:
                # As long as none fails one wait is for all: a task and a timer each take the driver longer than calls.
                await asyncio.wait(calls.values(), timeout=self._deadline, return_when=asyncio.FIRST_EXCEPTION)
            left = [target for target, call in calls.items() if not call.done() or call.exception()]
            waits = [self._update(manifests[target], target, handles[target], calls[target], end) for target in left]
            found = dict(zip(left, await asyncio.gather(*waits), strict=True))
        finally:
            for call in calls.values():
                call.cancel()
        return {target: found[target] if target in found else call.result() for target, call in calls.items()}

    def _call(self, manifest: WeightManifest, handle: Any) -> "asyncio.Future[float]":
        return asyncio.ensure_future(handle.update.remote(manifest, self._verify, self._tolerance))

    async def _update(
        self, manifest: WeightManifest, target: str, handle: Any, call: "asyncio.Future[float]", end: float
    ) -> float | RLHFError:
        """What becomes of a call; it is made again, until `end`, when a relay is lost with it."""
        what = f"{target}: update to version {manifest.version}"
        left = end - time.monotonic()
        while True:
            try:
                return await within(call, left, what)
            except RelayLostError as error:
                # No word about the engine. Another relay may be lost as well: a node that goes takes each that is
                # started on it before it is known to be gone.
                if time.monotonic() > end:
                    return error
                await asyncio.sleep(RELAY_PAUSE_S)
                call, left = self._call(manifest, handle), self._deadline
            except (PayloadError, EngineLostError) as error:
                return error
            except NoAnswerError:
                return EngineLostError(f"{what} did not end within {self._deadline:.0f} s")
            except RLHFError as error:
                # It died: nobody knows what it holds.
                return EngineLostError(str(error))
