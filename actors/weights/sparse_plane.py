"""The weight plane of sparse updates: nodes are patched, their generators take what lies there."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from actors.calls import within
from actors.fleet import GeneratorFleet
from actors.weights.nodes import NodeCopies
from actors.weights.plane import ObjectStorePlane, Outcomes
from rlhf.errors import EngineLostError, PayloadError, RLHFError
from rlhf.records import WeightManifest

NODE_S = 60.0
"""Seconds in which a generator must say where it is."""


class SparsePlane(ObjectStorePlane):
    """Sends a version's patches once to each node, and the whole of it to whoever that does not help.

    A target that refused what was made of a patch, one that was started again and one that is new get the learner's
    own buffers.
    """

    def __init__(
        self,
        fleet: GeneratorFleet,
        verify: bool,
        tolerance: float,
        deadline: float,
        alert: Callable[[str], None],
    ):
        super().__init__(fleet, verify, tolerance, deadline)
        self._copies = NodeCopies(deadline, alert)
        self._spread: WeightManifest | None = None

    async def _transfer(self, manifest: WeightManifest, handles: Mapping[str, Any]) -> Outcomes:
        if self._spread is manifest:
            self._sent_bytes = manifest.nbytes
            return await super()._transfer(manifest, handles)
        self._spread = manifest
        asked = await asyncio.gather(*(self._node(*target) for target in handles.items()))
        nodes = dict(zip(handles, asked, strict=True))
        lost: Outcomes = {target: node for target, node in nodes.items() if isinstance(node, RLHFError)}
        found = {target: node for target, node in nodes.items() if isinstance(node, str)}
        given = await self._copies.spread(manifest, sorted(set(found.values())))
        whole = any(each is manifest for each in given.values())
        self._sent_bytes = manifest.nbytes if whole else manifest.sent_bytes
        return lost | await self._update_all({target: given[node] for target, node in found.items()}, handles)

    async def _node(self, target: str, handle: Any) -> str | RLHFError:
        try:
            return await within(handle.node.remote(), NODE_S, f"{target}: node")
        except PayloadError as error:
            return error
        except RLHFError as error:
            return EngineLostError(str(error))
