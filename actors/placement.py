"""Where actors run: one placement group a role, with a deadline and a message that says what is missing."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.calls import within
from rlhf.errors import DeadlineError, RLHFError

SHUTDOWN_S = 60.0
"""What an actor that is to be replaced may take to stop its engine before it is killed, and then to be gone."""

NAME_POLL_S = 0.05


@dataclass(frozen=True)
class Role:
    """Actors of one kind: how many, what each needs, and how they are spread over nodes."""

    name: str
    count: int
    cpus: float
    gpus: float
    strategy: str

    def bundle(self) -> dict[str, float]:
        """Ray's resources of one actor."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


SHARES = 10_000
"""Parts of a GPU that Ray can count."""


@dataclass(frozen=True)
class SharedPlaces:
    """Places that hold an actor of each of several roles, on the same GPU; each counts for `share` of it."""

    group: PlacementGroup
    share: float


async def place_together(roles: Sequence[Role], deadline: float) -> SharedPlaces:
    """Reserve places for roles that share devices: number i of each role gets place i. Raises as `place` does."""
    together = share(roles)
    group = await place(together, deadline)
    return SharedPlaces(group, SHARES // max(1, sum(role.gpus > 0 for role in roles)) / SHARES)


def share(roles: Sequence[Role]) -> Role:
    """The roles as one: CPUs are added up, a GPU is there once."""
    return Role(
        " + ".join(role.name for role in roles),
        max(role.count for role in roles),
        sum(role.cpus for role in roles),
        max(role.gpus for role in roles),
        "PACK",
    )


async def seat(role: Role, deadline: float, places: SharedPlaces | None) -> tuple[Role, PlacementGroup]:
    """Where a role's actors go, and what each of them reserves there: the shared `places`, else some of its own."""
    if places is None:
        return role, await place(role, deadline)
    return replace(role, gpus=places.share if role.gpus else 0), places.group


async def place(role: Role, deadline: float) -> PlacementGroup:
    """Reserve the role's resources; raises `RLHFError` at once if no set of nodes can ever hold it.

    Raises `DeadlineError` naming the role and what the cluster has free when `deadline` seconds have passed.
    """
    check_fits(role, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    group = placement_group([role.bundle()] * role.count, strategy=role.strategy)
    try:
        await asyncio.wait_for(group.ready(), deadline)
    except TimeoutError:
        remove_placement_group(group)
        free = {name: value for name, value in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise DeadlineError(
            f"placing {role.count} {role.name} actors of {role.bundle()} took longer than {deadline:.0f} s; "
            f"free now: {free}"
        ) from None
    return group


def check_fits(role: Role, nodes: list[dict[str, Any]]) -> None:
    """Raise `RLHFError` if the nodes, all of them empty, could not hold the role's actors."""
    bundle = role.bundle()
    room = sum(int(min(node.get(name, 0) // amount for name, amount in bundle.items() if amount)) for node in nodes)
    if room < role.count:
        total = {name: sum(node.get(name, 0) for node in nodes) for name in bundle}
        raise RLHFError(
            f"{role.count} {role.name} actors of {bundle} do not fit this cluster ({len(nodes)} nodes, {total} in all, "
            f"room for {room}); ask for fewer or add nodes"
        )


async def stop(name: str, orderly: bool) -> None:
    """Stop an actor whose place another one is to take; it may be gone already.

    With `orderly` it is asked to stop its engine first, whose processes hold a GPU and would outlive it by seconds.
    """
    with suppress(ValueError):  # It is gone.
        actor = ray.get_actor(name)
        if orderly:
            with suppress(RLHFError):
                await within(actor.shutdown.remote(), SHUTDOWN_S, f"{name}: stopping the engine")
        ray.kill(actor)
    end = time.monotonic() + SHUTDOWN_S
    with suppress(ValueError):
        # Its name is free once the cluster knows that it is dead.
        while ray.get_actor(name) and time.monotonic() < end:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(NAME_POLL_S)


def actor_options(
    name: str, group: PlacementGroup, index: int, role: Role, environment: dict[str, str]
) -> dict[str, Any]:
    """Ray's options of the named actor that takes place `index` of a role."""
    return {
        "name": name,
        "num_cpus": role.cpus,
        "num_gpus": role.gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=index, placement_group_capture_child_tasks=True
        ),
        "runtime_env": {"env_vars": environment},
    }
