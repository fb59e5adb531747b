"""Which transport carries the weights of a run, and its plane."""

from collections.abc import Callable, Mapping
from typing import Protocol

from actors.engine.plugin import IPC, NCCL
from actors.fleet import GeneratorFleet
from actors.weights.ipc import IpcPlane
from actors.weights.ipc import Sender as IpcSender
from actors.weights.nccl import NcclPlane
from actors.weights.nccl import Sender as NcclSender
from actors.weights.plane import ObjectStorePlane, Plane
from actors.weights.sparse_plane import SparsePlane
from rlhf.config import RunConfig
from rlhf.config.adapters import FLOAT32_ON_GPU
from rlhf.errors import InputError

OBJECT_STORE = "object_store"


class Senders(NcclSender, IpcSender, Protocol):
    """A learner that can send by any transport."""


def pick_transport(config: RunConfig, device: str) -> str:
    """`sync.transport` with `auto` decided: if `device` is "cuda", `ipc` where roles share GPUs, else `nccl`.

    Adapters and sparse updates go through the object store anywhere. Raises `InputError` for `nccl` and `ipc` without
    GPUs, and for adapters in float32 with them.
    """
    asked = config.sync.transport
    if config.sync.lora == "adapters":
        if device == "cuda" and config.policy.dtype == "float32":
            raise InputError(FLOAT32_ON_GPU)
        return OBJECT_STORE
    if asked == "auto":
        if device != "cuda" or config.sync.sparse:
            return OBJECT_STORE
        return IPC if config.cluster.colocate else NCCL
    if asked in (NCCL, IPC) and device != "cuda":
        raise InputError(
            f"sync.transport = {asked!r}: needs GPUs, but this run is on device {device!r}; use object_store or auto"
        )
    return asked


def build_plane(
    transport: str,
    config: RunConfig,
    fleet: GeneratorFleet,
    learner: Senders,
    expected: Mapping[str, tuple[int, ...]],
    tolerance: float,
    alert: Callable[[str], None],
) -> Plane:
    """The plane of a transport; `expected` holds every checkpoint tensor, `tolerance` bounds the probe's error."""
    verify, deadline = config.sync.verify, config.cluster.deadlines.sync
    if config.sync.sparse:
        return SparsePlane(fleet, verify, tolerance, deadline, alert)
    if transport == OBJECT_STORE:
        return ObjectStorePlane(fleet, verify, tolerance, deadline)
    if transport == IPC:
        return IpcPlane(fleet, verify, tolerance, deadline, learner, expected)
    workers, buffer_bytes = config.generator.tensor_parallel, config.sync.bucket_mb << 20
    return NcclPlane(fleet, verify, tolerance, deadline, learner, expected, workers, buffer_bytes)
