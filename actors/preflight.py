"""What a run asks of a cluster against what its nodes have, before any actor is started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray

from rlhf.config.placement import RolePlacement

COLUMNS = ("role", "actors", "each", "strategy", "fit")

KINDS = ("CPU", "GPU")
"""Ray's own resources, first in every table; custom ones follow by name."""

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Role:
    """Actors of one kind: how many, what each needs, how they are spread over nodes and what these are labelled."""

    name: str
    count: int
    cpus: float
    gpus: float
    strategy: str
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def bundle(self) -> dict[str, float]:
        """Ray's resources of one actor."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}) | dict(self.resources)

    def placed(self, placement: RolePlacement) -> "Role":
        """The role as the config places it."""
        strategy = placement.strategy or self.strategy
        return replace(self, strategy=strategy, resources=placement.resources, labels=placement.labels)


def live_nodes() -> list[Resources]:
    """What each node of the cluster has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free_resources() -> str:
    """What the cluster has free, without what Ray keeps for itself."""
    found = ray.available_resources().items()
    return amounts({k: v for k, v in found if ":" not in k and "memory" not in k and "_group_" not in k}) or "nothing"


def rows(roles: Sequence[Role], nodes: Sequence[Resources]) -> list[list[str]]:
    """A table: role, actors, what each needs, strategy, how many fit the nodes if they were empty."""
    return [
        [
            role.name,
            str(role.count),
            amounts(role.bundle()),
            role.strategy.lower(),
            str(min(role.count, room(role, nodes))),
        ]
        for role in roles
    ]


def room(role: Role, nodes: Sequence[Resources]) -> int:
    """How many actors of one role the nodes could hold, all of them empty."""
    asked = {name: amount for name, amount in role.bundle().items() if amount}
    return sum(int(min(node.get(name, 0) // amount for name, amount in asked.items())) for node in nodes)


def shortages(roles: Sequence[Role], nodes: Sequence[Resources]) -> list[str]:
    """Why the roles can never all be placed on these nodes, a clause each; empty if they may be.

    Each is a proof: a role that does not fit by itself, or a resource of which less is there than all ask for. How
    roles share a node is Ray's to find out.
    """
    found = []
    for role in roles:
        if (there := room(role, nodes)) < role.count:
            found.append(f"{role.count} {role.name} actors of {amounts(role.bundle())} where {there} fit")
    names = {name for role in roles for name in role.bundle()}
    for name in sorted(names, key=lambda name: (name not in KINDS, name)):
        asked = sum(role.count * role.bundle().get(name, 0) for role in roles)
        there_are = sum(node.get(name, 0) for node in nodes)
        if asked > there_are:
            found.append(f"{number(asked)} {name} in all where there are {number(there_are)}")
    return found


def amounts(resources: Resources) -> str:
    """Resources as people write them: `2 CPU + 1 GPU`."""
    return " + ".join(f"{number(amount)} {name}" for name, amount in resources.items() if amount)


def number(value: float) -> str:
    """Without needless digits."""
    return f"{value:.4g}"
