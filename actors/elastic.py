"""Generators that come and go with the cluster's nodes (`generator.replicas: {min, max}`).

Every generator has a place of its own. One that no node holds stays asked for, which is what an autoscaler adds nodes
for. A node that is being drained (preempted, scaled down) is left in time: its generator gets no new prompts, has the
node's notice to end what it is sampling, and its place is asked for anew. A node that is gone without notice is a
death like any other: the fleet starts the generator again, where Ray finds a node for its place.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import ray
from ray._private.state import state as cluster_state

from actors.calls import first_line
from actors.fleet import GeneratorFleet
from actors.generator_launch import GeneratorLauncher
from actors.preflight import free_resources
from actors.reviving import FIRST_PAUSE_S
from rlhf.config.generator import Replicas
from rlhf.errors import RLHFError

WATCH_S = 2.0
"""Between two looks at the nodes."""

REPORT_S = 10.0
"""Between two lines about places that are missing."""

MARGIN_S = 5.0
"""Of a node's notice, what is left for the engine to stop."""

LONGEST_PAUSE_S = 600.0
"""Before a generator that failed to start is tried again."""


class Elastic:
    """Keeps as many generators as the nodes hold, `replicas.max` at most; those up to `min` have been started.

    `check` raises `RLHFError` for a node that is not as the others are; `grace_s` is what a generator gets on a node
    that is drained without a deadline.
    """

    def __init__(
        self,
        fleet: GeneratorFleet,
        launcher: GeneratorLauncher,
        check: Callable[[str], Awaitable[None]],
        replicas: Replicas,
        grace_s: float,
        alert: Callable[[str], None],
    ):
        self._fleet = fleet
        self._launcher = launcher
        self._check = check
        self._replicas = replicas
        self._grace_s = grace_s
        self._alert = alert
        names = [f"generator-{index}" for index in range(replicas.max)]
        self._gone = {name: asyncio.Event() for name in names}
        """Set where no generator is: its place is to be filled."""
        for name in names[replicas.min :]:
            self._gone[name].set()

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._gone:
                tasks.create_task(self._fill(name))
            leaving: dict[str, asyncio.Task[None]] = {}
            reported = time.monotonic()
            while True:
                await asyncio.sleep(WATCH_S)
                for name, (node, deadline) in (await asyncio.to_thread(self._notices)).items():
                    if not self._gone[name].is_set() and (name not in leaving or leaving[name].done()):
                        leaving[name] = tasks.create_task(self._leave(name, node, deadline))
                if time.monotonic() - reported >= REPORT_S:
                    reported = time.monotonic()
                    self._report(await asyncio.to_thread(self._launcher.nodes))

    async def _fill(self, name: str) -> None:
        """Whenever the place of a name is empty: ask for one, wait for it, start a generator there."""
        pause = FIRST_PAUSE_S
        while True:
            await self._gone[name].wait()
            self._fleet.expect(name)
            node = await self._launcher.wait_for_place(name)
            try:
                await self._check(node)
                handle = await self._launcher.launch(name)
            except (RLHFError, ray.exceptions.RayError) as error:
                await self._launcher.leave_place(name)
                self._alert(f"{name} could not join on node {node[:8]}: {first_line(error)}; next try in {pause:.0f} s")
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE_S, 2 * pause)
                continue
            pause = FIRST_PAUSE_S
            self._gone[name].clear()
            self._fleet.add(name, handle)
            self._alert(f"{name} joins on node {node[:8]}")

    async def _leave(self, name: str, node: str, deadline: float) -> None:
        grace = max(0.0, deadline - time.time() - MARGIN_S) if deadline else self._grace_s
        self._fleet.expect(name)
        self._alert(f"{name} leaves: node {node[:8]} is being drained, {grace:.0f} s for what it is sampling")
        await self._fleet.drain(name, f"node {node[:8]} is drained", grace)
        await self._launcher.leave_place(name)
        self._gone[name].set()

    def _notices(self) -> dict[str, tuple[str, float]]:
        """Node and deadline (seconds since the epoch, 0.0 for none) of every generator whose node is being drained."""
        draining = cluster_state.get_draining_nodes()
        nodes = self._launcher.nodes() if draining else {}
        return {name: (node, draining[node] / 1000) for name, node in nodes.items() if node in draining}

    def _report(self, nodes: Mapping[str, str]) -> None:
        missing = self._replicas.min - len(self._fleet.running())
        if missing > 0 and self._gone.keys() - nodes.keys():
            self._alert(f"waiting for places: {missing} generators fewer than generator.replicas.min; "
                        f"free now: {free_resources()}")  # fmt: skip
