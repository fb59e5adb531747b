"""Starts generators, in the places that they get on the cluster."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from actors.calls import within
from actors.engine.llm import EngineSpec, engine_environment
from actors.fleet import GeneratorFleet
from actors.generator import GeneratorActor
from actors.placement import Patience, SharedPlaces, actor_options, place, reserve, seat, stop
from actors.preflight import Role
from actors.relay import Relays
from actors.turns import FleetParty
from rlhf.config.generator import Generator
from rlhf.config.system import Deadlines
from rlhf.health import RestartBudget
from rlhf.ports import Monitor
from rlhf.rounds.turns import GENERATORS, Turns, turn_of

CONCURRENCY = 10_000
"""Calls an async actor takes at once; vLLM itself bounds what runs."""


@dataclass(frozen=True)
class Place:
    """Where a generator is: a bundle of a placement group, which is its own where generators come and go."""

    group: PlacementGroup
    bundle: int

    def node(self) -> str | None:
        """The id of the node that holds it; None while none does."""
        return placement_group_table(self.group)["bundles_to_node_id"].get(self.bundle) or None


class GeneratorLauncher:
    """Starts, ends and starts again the generators of one run; `role` is what the first of them need together."""

    def __init__(
        self,
        config: Generator,
        role: Role,
        spec: EngineSpec,
        shapes: dict[str, tuple[int, ...]],
        threads: int,
        deadlines: Deadlines,
        patience: Patience,
        turns: Turns | None = None,
        relays: Relays | None = None,
    ):
        """Behind `relays` the fleet's handles are theirs; without them the generators' own."""
        self._config = config
        self._role = role
        self._spec = spec
        self._shapes = shapes
        self._environment = engine_environment(spec.device, threads)
        self._deadlines = deadlines
        self._patience = patience
        self._turns = turns
        self._relays = relays
        self._places: dict[str, Place] = {}
        self.check: Callable[[str], Awaitable[None]] | None = None
        """Raises `RLHFError` for a node that is not as the others are, where generators change nodes."""

    async def start(
        self,
        elastic: bool,
        places: SharedPlaces | None,
        advance: Callable[[], None],
        budget: RestartBudget,
        monitor: Monitor,
        publishes_meanwhile: bool,
    ) -> GeneratorFleet:
        """The fleet of the first generators. With `elastic` each has a place of its own, which it can leave."""
        names = [f"generator-{index}" for index in range(self._role.count)]
        if elastic:
            one = replace(self._role, count=1)
            groups = await asyncio.gather(*(place(one, self._patience) for _ in names))
            self._places = {name: Place(group, 0) for name, group in zip(names, groups, strict=True)}
        else:
            self._role, group = await seat(self._role, self._patience, places)
            self._places = {name: Place(group, index) for index, name in enumerate(names)}

        async def first(name: str) -> Any:
            handle = await self.launch(name)
            advance()
            return handle

        async with turn_of(self._turns, GENERATORS):
            handles = await asyncio.gather(*(first(name) for name in names))
            fleet = GeneratorFleet(
                dict(zip(names, handles, strict=True)),
                self._config.sampling.model_dump(),
                int(self._config.engine.get("max_num_seqs", 128 if self._spec.device == "cpu" else 256)),
                self._again if elastic else self._restart,
                budget,
                self._deadlines.token,
                monitor.alert,
                publishes_meanwhile=publishes_meanwhile,
            )
            if elastic:
                fleet.expect_s = self._deadlines.start
            if self._turns:
                party = FleetParty(fleet, self.end, self._deadlines.sync, keep_weights=self._spec.adapters is not None)
                self._turns.join(GENERATORS, party)
        return fleet

    async def launch(self, name: str) -> Any:
        """Start the engine of a name in its place; returns its handle, the model loaded."""
        found = self._places[name]
        options = actor_options(name, found.group, found.bundle, self._role, self._environment)
        actor = ray.remote(GeneratorActor)
        handle: Any = actor.options(**options, max_concurrency=CONCURRENCY).remote(name, self._spec, self._shapes)
        node = await within(handle.start.remote(), self._deadlines.start, f"{name}: loading the model")
        return await self._relays.handle(name, handle, node) if self._relays else handle

    async def end(self, name: str) -> None:
        """Stop the actor of a name, if it is there."""
        await stop(name, orderly=self._spec.device == "cuda")

    async def wait_for_place(self, name: str) -> str:
        """Ask for a place for one more generator, and wait for it as long as it takes; returns its node."""
        self._places[name] = Place(reserve(replace(self._role, count=1)), 0)
        return await self._placed(name)

    async def leave_place(self, name: str) -> None:
        """End a generator and give its place back; what had been asked for is asked for no more."""
        await self.end(name)
        remove_placement_group(self._places.pop(name).group)

    def nodes(self) -> dict[str, str]:
        """The node of every place that is on one, by generator; may be called from another thread."""
        found = {name: place.node() for name, place in list(self._places.items())}
        return {name: node for name, node in found.items() if node}

    async def _placed(self, name: str) -> str:
        while True:
            await self._places[name].group.ready()
            if node := self._places[name].node():
                return node

    async def _restart(self, name: str) -> Any:
        await self.end(name)
        async with turn_of(self._turns, GENERATORS):
            return await self.launch(name)

    async def _again(self, name: str) -> Any:
        """Ray looks for another node for a place whose node is gone; it may be long until one comes."""
        await self.end(name)
        node = await self._placed(name)
        if self.check:
            await self.check(node)
        return await self.launch(name)
