"""Which transport carries the weights of a run, and its plane."""

from collections.abc import Callable, Mapping

from actors.engine.plugin import NCCL
from actors.fleet import GeneratorFleet
from actors.weights.nccl import NcclPlane, Sender
from actors.weights.plane import ObjectStorePlane, Plane
from actors.weights.sparse_plane import SparsePlane
from rlhf.config import RunConfig
from rlhf.config.adapters import FLOAT32_ON_GPU
from rlhf.errors import InputError

OBJECT_STORE = "object_store"


def pick_transport(config: RunConfig, device: str) -> str:
    """`sync.transport` with `auto` decided: `nccl` if `device` is "cuda", where every role has GPUs of its own.

    Adapters and sparse updates go through the object store anywhere. Raises `InputError` for `nccl` without GPUs, and
    for adapters in float32 with them.
    """
    asked = config.sync.transport
    if config.sync.lora == "adapters":
        if device == "cuda" and config.policy.dtype == "float32":
            raise InputError(FLOAT32_ON_GPU)
        return OBJECT_STORE
    if asked == "auto" and not config.sync.sparse:
        return NCCL if device == "cuda" else OBJECT_STORE
    if asked == "auto":
        return OBJECT_STORE
    if asked == NCCL and device != "cuda":
        raise InputError(
            f"sync.transport = 'nccl': needs GPUs, but this run is on device {device!r}; use object_store or auto"
        )
    return asked


def build_plane(
    transport: str,
    config: RunConfig,
    fleet: GeneratorFleet,
    learner: Sender,
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
    workers, buffer_bytes = config.generator.tensor_parallel, config.sync.bucket_mb << 20
    return NcclPlane(fleet, verify, tolerance, deadline, learner, expected, workers, buffer_bytes)
