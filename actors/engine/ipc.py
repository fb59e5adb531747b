"""CUDA IPC between a learner rank and the engine on its GPU: how memory is shared, and both ends of the transport."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from actors.weights.ipc import BUFFERS, DeviceBuffer, digest, lay_out, view
from rlhf.errors import RLHFError
from rlhf.records import Bucket

Export = Callable[[], Iterator[tuple[str, torch.Tensor]]]

HANDLE = (
    "storage_handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)
"""What torch's `rebuild_cuda_tensor` has to know of the memory: plain values, which vLLM sends without pickling."""


def share(buffer: torch.Tensor) -> dict[str, Any]:
    """What another process needs to map a CUDA buffer, uint8 [n]; one call is for one mapping there."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(buffer)
    (_, (size,), _, offset, _, _, _, handle, nbytes, place, _, counter, counter_place, event, sync) = arguments
    values = (handle, nbytes, place, counter, counter_place, event, sync)
    return {"size": size, "offset": offset} | dict(zip(HANDLE, values, strict=True))


def open_shared(handle: dict[str, Any], device: int, importer: Any) -> torch.Tensor:
    """The other process's buffer, mapped on CUDA device `device`.

    `importer` is vLLM's `PackedBufferImporter`: torch counts mappings, and one that is opened twice is never freed.
    """
    values = [handle[name] for name in HANDLE]
    layout = (torch.Tensor, torch.Size([handle["size"]]), (1,), handle["offset"])
    memory = (torch.storage.TypedStorage, torch.uint8, device, *values[:3])
    mapped: torch.Tensor = importer.rebuild([*layout, *memory, False, *values[3:]])
    return mapped


def device_id(device: torch.device | str) -> str:
    """A GPU's UUID, which does not depend on the GPUs that a process sees."""
    if torch.device(device).type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_properties(device).uuid)


class IpcSender:
    """One learner rank's end: fills its buffers with bucket after bucket, all ranks in step."""

    def __init__(self, export: Export, device: str, bucket_bytes: int):
        self._export = export
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._layout: tuple[Bucket, ...] | None = None
        self._running: Iterator[tuple[str, torch.Tensor]] | None = None
        self._buffers: list[torch.Tensor] = []
        self._handles: list[dict[str, Any]] = []

    def layout(self) -> tuple[Bucket, ...]:
        """The payload's buckets, without checksums; exports once, on all ranks, and remembers what it saw."""
        if self._layout is None:
            self._layout = lay_out(self._export(), self._bucket_bytes)
        return self._layout

    def begin(self) -> None:
        """Get the buffers; what is left of a sending that was broken off is forgotten."""
        self.end()
        size = max(bucket.nbytes for bucket in self.layout())
        count = min(BUFFERS, len(self.layout()))
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(count)]
        self._handles = [share(buffer) for buffer in self._buffers]
        self._running = self._export()

    def fill(self, number: int) -> DeviceBuffer:
        """Put bucket `number`, the next one, into its buffer."""
        bucket, slot, running = self.layout()[number], number % BUFFERS, self._running
        if running is None:
            raise RLHFError(f"bucket {number}: no sending has begun")
        buffer = self._buffers[slot]
        for spec in bucket.tensors:
            name, tensor = next(running)
            if (name, tuple(tensor.shape)) != (spec.name, spec.shape):
                raise RLHFError(f"bucket {number}: {name} {tuple(tensor.shape)} came where {spec.name} was expected")
            view(buffer, spec).copy_(tensor)
        # Ends once the copies are there: the other process waits for none of this one's streams.
        checksum = digest(buffer[: bucket.nbytes])
        return DeviceBuffer(device_id(self._device), slot, self._handles[slot], checksum)

    def end(self) -> None:
        """Give the buffers back, once the engines have let go of them."""
        self._running, self._buffers, self._handles = None, [], []
        if self._device != "cpu":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()


def staging_info(number: int, bucket: Bucket, filled: list[DeviceBuffer], last: bool, verify: bool) -> dict[str, Any]:
    """What an engine's worker is told of a bucket: see `actors.engine.ipc_transfer.IpcUpdateInfo`."""
    return {
        "phase": "stage",
        "number": number,
        "nbytes": bucket.nbytes,
        "tensors": [asdict(spec) for spec in bucket.tensors],
        "buffers": {buffer.device: asdict(buffer) for buffer in filled},
        "last": last,
        "verify": verify,
    }
