"""The `nccl` transport: the learner broadcasts from its GPU to every engine's workers, in one group.

Nothing is staged: the engines load what arrives. The names and shapes are checked before any engine is touched; that
the bytes are right is what the probe shows, checksums are not taken. Whoever fails in the middle leaves the others
with half a payload, so they are all replaced, and the group is made anew.
"""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.calls import within
from actors.fleet import GeneratorFleet
from actors.weights.payload import check_complete
from actors.weights.plane import Outcomes, Plane
from rlhf.errors import EngineLostError, LearnerLostError, PayloadError, RLHFError
from rlhf.records import Bucket, WeightManifest


@dataclass(frozen=True)
class NcclGroup:
    """One group: learner rank 0 is rank 0 and holds the meeting point, then come the engines' workers.

    `packed` sends the tensors in buffers of `buffer_bytes` instead of one by one. Both sides have to agree on it.
    """

    address: str
    port: int
    world_size: int
    packed: bool
    buffer_bytes: int

    def engine_info(self, rank_offset: int) -> dict[str, Any]:
        """What vLLM's `nccl` engine needs to join; its first worker becomes rank `rank_offset`."""
        return {
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": rank_offset,
            "world_size": self.world_size,
            "packed": self.packed,
            "packed_buffer_size_bytes": self.buffer_bytes,
        }


def update_info(buckets: Sequence[Bucket]) -> dict[str, Any]:
    """What vLLM's `nccl` engine needs to know of a payload: name, dtype and shape in the order of sending."""
    specs = [spec for bucket in buckets for spec in bucket.tensors]
    return {
        "names": [spec.name for spec in specs],
        "dtype_names": [spec.dtype for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }


class Sender(Protocol):
    """The learner's side. `calls` are the generators' calls at the other end: if one fails, the wait is over.

    Both raise `EngineLostError` when the other end failed or the deadline passed and the group was torn down,
    `LearnerLostError` when a rank is gone.
    """

    generation: int
    """Another number means other processes, which have joined no group."""

    async def rendezvous(self) -> tuple[str, int]:
        """An address and a free port where rank 0 can be met."""
        ...

    async def open_nccl(self, group: NcclGroup, calls: Sequence[Any]) -> None:
        """Join a new group, in place of an earlier one."""
        ...

    async def send_nccl(self, calls: Sequence[Any]) -> None:
        """Broadcast the weights."""
        ...


class NcclPlane(Plane):
    """The `WeightPlane` port over vLLM's own `nccl` backend. Manifests carry names and probes, no bytes.

    Nothing is kept that could be sent again: a generator that is started again waits for the next version.
    """

    resends = False

    def __init__(
        self,
        fleet: GeneratorFleet,
        verify: bool,
        tolerance: float,
        deadline: float,
        learner: Sender,
        expected: Mapping[str, tuple[int, ...]],
        workers: int,
        buffer_bytes: int,
    ):
        """`expected` holds every tensor of the checkpoint, `workers` is the number of GPUs of one engine."""
        super().__init__(fleet, verify, tolerance, deadline)
        self._learner = learner
        self._expected = expected
        self._workers = workers
        self._buffer_bytes = buffer_bytes
        self._joined: tuple[int, dict[str, Any]] | None = None

    async def _transfer(self, manifest: WeightManifest, handles: Mapping[str, Any]) -> Outcomes:
        check_complete(manifest.buckets, self._expected)
        # A new actor in an old one's place is another handle, and a learner that was started again another generation:
        # the group is then made anew.
        members, joined = (self._learner.generation, dict(handles)), self._joined
        self._joined = None
        if members != joined and (refused := await self._open(manifest, handles)):
            return refused
        calls = {
            target: handle.receive.remote(manifest, self._verify, self._tolerance) for target, handle in handles.items()
        }
        what = f"update to version {manifest.version}"
        outcomes = await self._together(what, self._learner.send_nccl(list(calls.values())), calls, handles)
        if not any(isinstance(outcome, RLHFError) for outcome in outcomes.values()):
            self._joined = members
        return outcomes

    async def _open(self, manifest: WeightManifest, handles: Mapping[str, Any]) -> Outcomes:
        """Let learner and engines meet; returns nothing if all did, else why none of them got the payload."""
        address, port = await self._learner.rendezvous()
        # A packed buffer can only be cut into tensors at multiples of their element size.
        packed = len({spec.dtype for bucket in manifest.buckets for spec in bucket.tensors}) == 1
        group = NcclGroup(address, port, 1 + len(handles) * self._workers, packed, self._buffer_bytes)
        calls = {
            target: handle.open_nccl.remote(group, 1 + index * self._workers)
            for index, (target, handle) in enumerate(handles.items())
        }
        what = "joining the NCCL group"
        outcomes = await self._together(what, self._learner.open_nccl(group, list(calls.values())), calls, handles)
        errors = [outcome for outcome in outcomes.values() if isinstance(outcome, RLHFError)]
        if not errors:
            return {}
        # Who joined waits for nobody: it may go on and join the next group.
        return {
            target: outcome if isinstance(outcome, RLHFError) else PayloadError(f"{target}: not sent; {errors[0]}")
            for target, outcome in outcomes.items()
        }

    async def _together(
        self, what: str, leader: Awaitable[None], calls: Mapping[str, Awaitable[Any]], handles: Mapping[str, Any]
    ) -> Outcomes:
        """Run both ends. When the learner's end fails, an engine that is not through yet counts as lost.

        It waits for a sender that is gone, and nothing can be done about that from outside: when the learner itself is
        lost, other engines take the place of all such.
        """
        tasks = {
            target: asyncio.ensure_future(within(call, self._deadline, f"{target}: {what}"))
            for target, call in calls.items()
        }
        reason: RLHFError | None = None
        try:
            try:
                await leader
                await asyncio.gather(*tasks.values(), return_exceptions=True)
            except EngineLostError as error:
                reason = error
            except LearnerLostError as error:
                for target, task in tasks.items():
                    if isinstance(outcome := _outcome(task, error), EngineLostError):
                        self._fleet.lost(target, str(outcome), handles[target])
                raise
            return {target: _outcome(task, reason) for target, task in tasks.items()}
        finally:
            for task in tasks.values():
                task.cancel()


def _outcome(task: "asyncio.Future[Any]", reason: RLHFError | None) -> Any:
    if not task.done():
        return EngineLostError(str(reason))
    try:
        return task.result()
    except RLHFError as error:
        return error if isinstance(error, EngineLostError) else EngineLostError(str(error))
