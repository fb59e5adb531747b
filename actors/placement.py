"""Where actors run: one placement group a role, with a deadline and a message that says what is missing."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.calls import within
from actors.preflight import Role, amounts, free_resources, live_nodes, shortages
from rlhf.errors import DeadlineError, RLHFError

SHUTDOWN_S = 60.0
"""What an actor that is to be replaced may take to stop its engine before it is killed, and then to be gone."""

NAME_POLL_S = 0.05


REPORT_S = 10.0
"""Between two lines about what is still missing."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for places, in seconds; whether nodes may be added meanwhile; who is told of the wait."""

    deadline: float
    grows: bool = False
    tell: Callable[[str], None] = lambda message: None


SHARES = 10_000
"""Parts of a GPU that Ray can count."""


@dataclass(frozen=True)
class SharedPlaces:
    """Places that hold an actor of each of several roles, on the same GPU; each counts for `share` of it."""

    group: PlacementGroup
    share: float


async def place_together(roles: Sequence[Role], patience: Patience) -> SharedPlaces:
    """Reserve places for roles that share devices: number i of each role gets place i. Raises as `place` does."""
    together = share(roles)
    group = await place(together, patience)
    return SharedPlaces(group, SHARES // max(1, sum(role.gpus > 0 for role in roles)) / SHARES)


def share(roles: Sequence[Role]) -> Role:
    """The roles as one: CPUs are added up, a GPU is there once."""
    return Role(
        " + ".join(role.name for role in roles),
        max(role.count for role in roles),
        sum(role.cpus for role in roles),
        max(role.gpus for role in roles),
        "PACK",
        {name: amount for role in roles for name, amount in role.resources.items()},
        {name: value for role in roles for name, value in role.labels.items()},
    )


async def seat(role: Role, patience: Patience, places: SharedPlaces | None) -> tuple[Role, PlacementGroup]:
    """Where a role's actors go, and what each of them reserves there: the shared `places`, else some of its own."""
    if places is None:
        return role, await place(role, patience)
    return replace(role, gpus=places.share if role.gpus else 0, resources={}), places.group


async def place(role: Role, patience: Patience) -> PlacementGroup:
    """Reserve the role's resources; raises `RLHFError` at once if the nodes can never hold it and none are added.

    Raises `DeadlineError` naming the role and what the cluster has free when the time has passed.
    """
    check([role], patience)
    group = reserve(role)
    wanted = f"{role.count} {role.name} actors of {amounts(role.bundle())}"
    ready = asyncio.ensure_future(group.ready())
    end = time.monotonic() + patience.deadline
    while not ready.done():
        left = end - time.monotonic()
        if left <= 0:
            remove_placement_group(group)
            raise DeadlineError(
                f"placing {wanted} took longer than {patience.deadline:.0f} s; free now: {free_resources()}"
            )
        await asyncio.wait({ready}, timeout=min(left, REPORT_S))
        if not ready.done():
            patience.tell(f"waiting for places: {wanted}; free now: {free_resources()}")
    await ready
    return group


def reserve(role: Role) -> PlacementGroup:
    """Ask for the role's places; they are there once the group is ready."""
    selectors = [dict(role.labels)] * role.count if role.labels else None
    return placement_group([role.bundle()] * role.count, role.strategy, bundle_label_selector=selectors)


def check(roles: Sequence[Role], patience: Patience) -> None:
    """Raise `RLHFError` if the nodes, all of them empty, could not hold the roles; say so where nodes may be added."""
    nodes = live_nodes()
    if missing := shortages(roles, nodes):
        message = f"this cluster ({len(nodes)} nodes) cannot hold the run: {'; '.join(missing)}"
        if not patience.grows:
            raise RLHFError(f"{message}; ask for fewer or add nodes (cluster.grows waits for an autoscaler's)")
        patience.tell(f"{message}; waiting for nodes")


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
        "resources": dict(role.resources),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=index, placement_group_capture_child_tasks=True
        ),
        "runtime_env": {"env_vars": environment},
    }
