"""The learner's end of the `object_store` transport: a version's packed buffers, and patches from the one before."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import ray
import torch

from actors.weights.payload import empty, pack
from actors.weights.sparse import encode
from rlhf.records import Bucket, Probe, WeightManifest

WORTH = 0.5
"""A patch over this share of its buffer is not worth its decoding: the buffer travels whole."""


@dataclass(frozen=True, slots=True)
class Publishing:
    """How a learner's ranks give out versions.

    `refresh_every` makes patches, but for each such-th version; None makes none. `adapters` publishes the LoRA
    adapters alone instead of the weights they are merged into.
    """

    transport: str = "object_store"
    bucket_bytes: int = 256 << 20
    refresh_every: int | None = None
    adapters: bool = False


class Outgoing:
    """Puts versions into Ray's object store; this process owns the buffers."""

    def __init__(self, publishing: Publishing):
        self._bucket_bytes = publishing.bucket_bytes
        self._refresh_every = publishing.refresh_every
        self._scratch = empty(0)
        self._versions = 0
        self._digest = ""
        self._last: tuple[tuple[Bucket, np.ndarray], ...] = ()

    def manifest(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]], probes: tuple[Probe, ...]
    ) -> WeightManifest:
        """Pack and put a version. The buffers live as long as somebody holds the manifest or a later one's base."""
        patched = self._refresh_every is not None and self._versions % self._refresh_every > 0
        buckets, kept = [], []
        for number, (bucket, buffer) in enumerate(pack(tensors, self._bucket_bytes, self._buffer)):
            put = replace(bucket, handle=ray.put(buffer))
            if self._refresh_every is not None:
                # The object store's own copy, mapped: the next version is compared with it.
                kept.append((put, ray.get(put.handle)))
            buckets.append(self._patched(number, put, buffer) if patched else put)
        base = self._digest if patched and any(bucket.patch is not None for bucket in buckets) else None
        manifest = WeightManifest(version, tuple(buckets), probes, base)
        self._versions += 1
        self._last, self._digest = tuple(kept), manifest.digest()
        return manifest

    def _buffer(self, size: int) -> np.ndarray:
        # One for all buckets and versions, since the object store takes a copy of each at once: the first touch of
        # fresh memory costs several times what packing does.
        if len(self._scratch) < size:
            self._scratch = empty(size)
        return self._scratch[:size]

    def _patched(self, number: int, bucket: Bucket, buffer: np.ndarray) -> Bucket:
        """The bucket with its patch, where the version before had the same tensors there and most words stayed."""
        if number >= len(self._last):
            return bucket
        before, old = self._last[number]
        if [(spec.name, spec.offset, spec.nbytes) for spec in before.tensors] != [
            (spec.name, spec.offset, spec.nbytes) for spec in bucket.tensors
        ]:
            return bucket
        patch = encode(old, buffer)
        if len(patch.data) > WORTH * len(buffer):
            return bucket
        return replace(bucket, patch=ray.put(patch.data), patch_bytes=len(patch.data), changed=patch.changed)
