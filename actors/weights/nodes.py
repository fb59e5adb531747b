"""Sparse updates on their way: every node keeps a copy of the weights and gets the words that changed.

On each node that has a generator one small actor holds the buffers of the version before. It fetches the patches,
writes them into a copy, checks that against the learner's checksums and puts it into its node's object store, where
the node's engines map it as they would the learner's own buffers. What does not fit, is damaged, or was never there
is answered with a whole payload.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.calls import first_line, within
from actors.weights.payload import verify_bucket
from actors.weights.sparse import apply
from rlhf.errors import PayloadError, RLHFError
from rlhf.records import Bucket, WeightManifest


class NodeCopyActor:
    """The copy of one node."""

    def __init__(self) -> None:
        self._digest: str | None = None
        self._references: list[ray.ObjectRef] = []
        self._buffers: list[np.ndarray] = []

    def patch(self, manifest: WeightManifest, deadline: float) -> list[ray.ObjectRef]:
        """This node's buffers of a version, made of its base and the patches; each has passed its checksums.

        Raises `PayloadError` if the base is not the manifest's or a patch does not give the version, `GetTimeoutError`
        if the patches are not here within `deadline` seconds. A buffer without a patch is fetched whole.
        """
        if self._digest is None or self._digest != manifest.base:
            raise PayloadError(f"version {manifest.version}: its patches are for other weights than this node's")
        # Whatever fails from here on: the copy is no longer trusted.
        self._digest = None
        buckets = manifest.buckets
        wanted = [bucket.handle if bucket.patch is None else bucket.patch for bucket in buckets]
        arrived = ray.get(wanted, timeout=deadline)
        references = [
            self._place(number, bucket, data)
            for number, (bucket, data) in enumerate(zip(buckets, arrived, strict=True))
        ]
        self._references, self._buffers = references, ray.get(references)
        self._digest = manifest.digest()
        return references

    def _place(self, number: int, bucket: Bucket, data: np.ndarray) -> ray.ObjectRef:
        if bucket.patch is None:
            return bucket.handle
        if not bucket.changed:
            return self._references[number]
        buffer = self._buffers[number].copy()
        apply(buffer, data)
        verify_bucket(bucket, buffer)
        return ray.put(buffer)

    def whole(self, manifest: WeightManifest, deadline: float) -> None:
        """Fetch a version's buffers and keep them as the base of the next; raises `GetTimeoutError`, `PayloadError`."""
        self._digest = None
        self._references = [bucket.handle for bucket in manifest.buckets]
        self._buffers = ray.get(self._references, timeout=deadline)
        for bucket, buffer in zip(manifest.buckets, self._buffers, strict=True):
            verify_bucket(bucket, buffer)
        self._digest = manifest.digest()


class NodeCopies:
    """The copies of all nodes, as the weight plane sees them."""

    def __init__(self, deadline: float, alert: Callable[[str], None]):
        """`deadline` is in seconds and for one version; `alert` is told where a whole payload had to be sent."""
        self._deadline = deadline
        self._alert = alert
        self._actors: dict[str, Any] = {}

    async def spread(self, manifest: WeightManifest, nodes: Sequence[str]) -> dict[str, WeightManifest]:
        """Bring a version to nodes, by id; returns for each the manifest that its generators take.

        That of a node which was patched names buffers of its own. Any other node's is `manifest` itself, and the node
        keeps what it fetched as the base of the next version.
        """
        given = await asyncio.gather(*(self._bring(manifest, node) for node in nodes))
        return dict(zip(nodes, given, strict=True))

    async def _bring(self, manifest: WeightManifest, node: str) -> WeightManifest:
        what = f"copy of the weights on node {node[:8]}: version {manifest.version}"
        if manifest.base is not None and node in self._actors:
            call = self._actors[node].patch.remote(manifest, self._deadline)
            try:
                handles = await within(call, self._deadline, what)
            except (RLHFError, ray.exceptions.RayError) as error:
                self._failed(node, error, f"{what}: sent whole: {first_line(error)}")
            else:
                patched = zip(manifest.buckets, handles, strict=True)
                buckets = tuple(replace(bucket, handle=handle, patch=None) for bucket, handle in patched)
                return replace(manifest, buckets=buckets, base=None)
        if node not in self._actors:
            self._actors[node] = start_copy(node)
        try:
            await within(self._actors[node].whole.remote(manifest, self._deadline), self._deadline, what)
        except (RLHFError, ray.exceptions.RayError) as error:
            self._failed(node, error, f"{what}: not kept, the next one is sent whole too: {first_line(error)}")
        return manifest

    def _failed(self, node: str, error: Exception, message: str) -> None:
        self._alert(message)
        if not isinstance(error, PayloadError):
            # It died, or nobody knows what it is doing.
            ray.kill(self._actors.pop(node))


def start_copy(node: str) -> Any:
    """Start a node's copy there; calls wait until it runs."""
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(NodeCopyActor).options(num_cpus=0, scheduling_strategy=place).remote()
