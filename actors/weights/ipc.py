"""The `ipc` transport: each learner rank hands its weights to the engine on the same GPU, without a copy between them.

A rank has two buffers, which the engine's worker maps by CUDA IPC. Bucket by bucket the ranks fill one of them while
the engines take a copy of the other, so that ZeRO-3 gathers no more than a bucket at a time. The engines keep their
copies, in the memory that the sleeping KV cache has left, until all of them are there and have passed their checks:
names, shapes, and a checksum of each bucket taken at both ends. Only then is an engine's model touched.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from actors.calls import within
from actors.fleet import GeneratorFleet
from actors.weights.payload import ALIGNMENT, check_complete
from actors.weights.plane import Outcomes, Plane
from rlhf.errors import EngineLostError, PayloadError, RLHFError
from rlhf.records import Bucket, TensorSpec, WeightManifest

BUFFERS = 2
WORDS = 1 << 20
"""Words that `digest` multiplies at a time."""
ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 / golden ratio, which is odd, as a signed number: multiples of it spread over all 64 bits."""
FACTOR = 0x5851F42D4C957F2D
"""Knuth's multiplier of MMIX, to tell parts of `WORDS` words apart."""


@dataclass(frozen=True, slots=True)
class DeviceBuffer:
    """A filled buffer of one rank: the GPU's UUID, which of the buffers, what maps it, and `digest` of its bytes."""

    device: str
    slot: int
    handle: dict[str, Any]
    checksum: int


class Sender(Protocol):
    """The learner's side; each call goes to all ranks. A lost rank is an error of its own, no target's."""

    async def begin_ipc(self, version: int) -> None:
        """Get the buffers; raises `PayloadError` if the learner does not hold `version` any more."""
        ...

    async def fill_ipc(self, number: int) -> list[DeviceBuffer]:
        """Put the next bucket into its buffer, on each rank."""
        ...

    async def end_ipc(self) -> None:
        """Give the buffers back."""
        ...


class IpcPlane(Plane):
    """The `WeightPlane` port over CUDA IPC. Manifests carry names, places in the buckets and probes, no bytes.

    The learner holds the published weights until its next step, so a generator that is started again gets them too.
    """

    resends = True

    def __init__(
        self,
        fleet: GeneratorFleet,
        verify: bool,
        tolerance: float,
        deadline: float,
        learner: Sender,
        expected: Mapping[str, tuple[int, ...]],
    ):
        """`expected` holds every tensor of the checkpoint."""
        super().__init__(fleet, verify, tolerance, deadline)
        self._learner = learner
        self._expected = expected

    async def _transfer(self, manifest: WeightManifest, handles: Mapping[str, Any]) -> Outcomes:
        check_complete(manifest.buckets, self._expected)
        end = time.monotonic() + self._deadline
        try:
            await self._learner.begin_ipc(manifest.version)
        except PayloadError as error:
            return dict.fromkeys(handles, error)
        try:
            failed = await self._stage(manifest, handles, end)
        except BaseException:
            # What they hold would be in the way of whoever gets the GPUs now.
            drops = [within(handle.drop_ipc.remote(), self._deadline, "drop") for handle in handles.values()]
            await asyncio.gather(*drops, return_exceptions=True)
            raise
        await self._learner.end_ipc()
        staged = {target: handle for target, handle in handles.items() if target not in failed}
        what = f"update to version {manifest.version}"
        calls = [
            self._outcome(target, handle.load_ipc.remote(manifest, self._verify, self._tolerance), end, what)
            for target, handle in staged.items()
        ]
        outcomes = failed | dict(zip(staged, await asyncio.gather(*calls), strict=True))
        return {target: outcomes[target] for target in handles}

    async def _stage(self, manifest: WeightManifest, handles: Mapping[str, Any], end: float) -> Outcomes:
        """Bring all buckets to all engines; returns the errors of those that did not take theirs."""
        failed: Outcomes = {}
        last = len(manifest.buckets) - 1
        filled = await self._learner.fill_ipc(0)
        for number, bucket in enumerate(manifest.buckets):
            left = {target: handle for target, handle in handles.items() if target not in failed}
            what = f"bucket {number} of version {manifest.version}"
            # The buffer that is filled now has been copied by all: its bucket was the one before this.
            following = asyncio.ensure_future(self._learner.fill_ipc(number + 1)) if number < last else None
            calls = [
                self._outcome(
                    target, handle.stage_ipc.remote(number, bucket, filled, number == last, self._verify), end, what
                )
                for target, handle in left.items()
            ]
            ends = await asyncio.gather(*calls)
            failed |= {target: found for target, found in zip(left, ends, strict=True) if isinstance(found, RLHFError)}
            if following:
                filled = await following
        return failed

    async def _outcome(self, target: str, call: Any, end: float, what: str) -> Any:
        """What the call gives, or the error that says what became of the engine."""
        try:
            return await within(call, max(0.0, end - time.monotonic()), f"{target}: {what}")
        except (PayloadError, EngineLostError) as error:
            return error
        except RLHFError as error:
            # It died or did not answer in time: nobody knows what it holds.
            return EngineLostError(str(error))


def lay_out(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Where each tensor goes: buckets of about `bucket_bytes`, a larger tensor in one of its own; no checksums."""
    buckets: list[Bucket] = []
    held: list[TensorSpec] = []
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        aligned = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if held and size + aligned > bucket_bytes:
            buckets.append(Bucket(tuple(held), size))
            held, size = [], 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        held.append(TensorSpec(name, dtype, tuple(tensor.shape), size, nbytes, checksum=""))
        size += aligned
    if held:
        buckets.append(Bucket(tuple(held), size))
    return tuple(buckets)


def view(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """A tensor's place in a bucket's uint8 buffer, to be read or written."""
    place = buffer[spec.offset : spec.offset + spec.nbytes]
    return place.view(getattr(torch, spec.dtype)).view(spec.shape)


def digest(data: torch.Tensor) -> int:
    """A 64-bit checksum of uint8 [8 n], the same on every device: the words times odd numbers, modulo 2^64.

    It finds bytes that are stale, overwritten or in another place. It is no match for anybody who wants to deceive.
    """
    words = data.view(torch.int64)
    place = torch.arange(min(len(words), WORDS), device=data.device)
    factors = (place * ODD) ^ ((place * ODD) >> 29) | 1
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for part in words.split(WORDS):
        total = total * FACTOR + (part * factors[: len(part)]).sum()
    return int(total)
