"""Receives weights by CUDA IPC inside vLLM's worker: a copy of each bucket, checked, and only then the load.

vLLM's own `ipc` engine loads a bucket as it arrives, so that a payload that breaks off costs the model. Here it is
staged whole, as with the `object_store` transport, whose load this is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter

from actors.engine.ipc import device_id, open_shared
from actors.engine.transfer import ObjectStoreTransferEngine
from actors.weights.ipc import BUFFERS, digest, view
from actors.weights.payload import check_complete
from rlhf.errors import PayloadError
from rlhf.records import Bucket, TensorSpec


@dataclass
class IpcInitInfo(WeightTransferInitInfo):
    """What a whole payload holds: (name, shape) of every checkpoint tensor."""

    expected: list[tuple[str, list[int]]]


@dataclass
class IpcUpdateInfo(WeightTransferUpdateInfo):
    """One phase of an update: `stage` with bucket `number`, `load`, or `discard`.

    `buffers` are the ranks' `DeviceBuffer`s by GPU, `tensors` the bucket's table; after the `last` bucket the payload
    is checked whole.
    """

    phase: str
    number: int = 0
    nbytes: int = 0
    tensors: list[dict[str, Any]] = field(default_factory=list)
    buffers: dict[str, dict[str, Any]] = field(default_factory=dict)
    last: bool = False
    verify: bool = True


class IpcReceiver:
    """Holds the buckets that were staged last."""

    def __init__(self, expected: dict[str, tuple[int, ...]], device: torch.device):
        self._expected = expected
        self._device = device
        self._staged: list[tuple[Bucket, torch.Tensor]] = []
        self._importers = [PackedBufferImporter() for _ in range(BUFFERS)]

    def stage(self, info: IpcUpdateInfo) -> None:
        """Take a copy of a bucket; raises `PayloadError` for one that is not what the learner put there."""
        if info.number == 0:
            self.drop()
        if info.number != len(self._staged):
            raise PayloadError(f"weight payload: bucket {info.number} came, bucket {len(self._staged)} is next")
        specs = tuple(TensorSpec(**(row | {"shape": tuple(row["shape"])})) for row in info.tensors)
        bucket = Bucket(specs, info.nbytes)
        found = info.buffers.get(device_id(self._device))
        if found is None:
            raise PayloadError(
                f"weight payload: no learner rank is on this engine's GPU {device_id(self._device)}, but on "
                f"{', '.join(info.buffers)}; placement put them on different GPUs"
            )
        shared = open_shared(found["handle"], self._device.index or 0, self._importers[found["slot"]])
        copy = shared[: bucket.nbytes].clone()
        if self._device.type == "cuda":
            # The learner fills its buffer again, and the mapping may go, once this call has ended.
            torch.cuda.synchronize(self._device)
        if info.verify and digest(copy) != found["checksum"]:
            first = bucket.tensors[0].name
            raise PayloadError(f"weight payload: checksum of bucket {info.number}, from {first} on, does not match")
        self._staged.append((bucket, copy))
        if info.last:
            self._release()
            check_complete([bucket for bucket, _ in self._staged], self._expected)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is staged; views of the copies."""
        for bucket, copy in self._staged:
            for spec in bucket.tensors:
                yield spec.name, view(copy, spec)

    def drop(self) -> None:
        """Forget what is staged, and let go of the learner's buffers."""
        self._staged = []
        self._release()

    def _release(self) -> None:
        for importer in self._importers:
            importer.close()


class IpcTransferEngine(ObjectStoreTransferEngine):
    """vLLM's receiving end of the `ipc` transport."""

    init_info_cls: Any = IpcInitInfo
    update_info_cls: Any = IpcUpdateInfo
    _receiver: Any = None

    def init_transfer_engine(self, init_info: Any) -> None:
        """Learn what a payload holds; there is nobody to meet."""
        expected = {name: tuple(shape) for name, shape in init_info.expected}
        self._receiver = IpcReceiver(expected, self.device)

    def receive_weights(self, update_info: Any) -> None:
        """Run one phase; raises `PayloadError` from `stage`, anything from `load`."""
        receiver = self._receiver
        assert receiver is not None, "init_transfer_engine comes first"
        if update_info.phase == "stage":
            receiver.stage(update_info)
            return
        if update_info.phase == "load":
            self._load(receiver)
        receiver.drop()
