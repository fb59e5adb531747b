"""Starts the learner's ranks."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import ray

from actors.cluster import ClusterInfo
from actors.learner import LearnerActor, LearnerGroup
from actors.placement import Patience, SharedPlaces, actor_options, seat, stop
from actors.preflight import Role
from actors.weights.outgoing import Publishing
from rlhf.config.learner import Learner
from rlhf.config.placement import RolePlacement
from rlhf.config.system import Deadlines
from rlhf.health import RestartBudget
from rlhf.learning.job import LearnerJob
from rlhf.ports import Monitor


def learner_role(config: Learner, cluster: ClusterInfo, placement: RolePlacement | None = None) -> Role:
    """What the ranks need."""
    cpus = cluster.reserved(cluster.threads(config.cpus, config.world_size))
    role = Role("learner", config.world_size, cpus, int(cluster.device == "cuda"), "PACK")
    return role.placed(placement or RolePlacement())


async def start_learner(
    job: LearnerJob,
    cluster: ClusterInfo,
    deadlines: Deadlines,
    budget: RestartBudget,
    monitor: Monitor,
    advance: Callable[[int], None],
    *,
    publishing: Publishing | None = None,
    probes: Sequence[Sequence[int]] = (),
    placement: RolePlacement | None = None,
    grows: bool = False,
    places: SharedPlaces | None = None,
) -> LearnerGroup:
    """The ranks behind the `Learner` port, met and with their models loaded; `probes` prove published weights.

    Restarts take from `budget`; the new ranks have the names and the places of the old ones. `places` are shared ones.
    """
    config = job.learner
    threads = cluster.threads(config.cpus, config.world_size)
    patience = Patience(deadlines.start, grows, monitor.alert)
    role, group = await seat(learner_role(config, cluster, placement), patience, places)
    environment = {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR"}
    actor = ray.remote(LearnerActor)
    names = [f"learner-{rank}" for rank in range(config.world_size)]

    def launch() -> list[Any]:
        return [
            actor.options(**actor_options(name, group, rank, role, environment)).remote(
                job, rank, config.world_size, cluster.device, publishing or Publishing()
            )
            for rank, name in enumerate(names)
        ]

    async def relaunch() -> list[Any]:
        # Nothing is asked of ranks that are left: they may be waiting in a collective.
        await asyncio.gather(*(stop(name, orderly=False) for name in names))
        return launch()

    learner = LearnerGroup(launch(), deadlines, probes, relaunch, budget, monitor.alert)
    for note in await learner.start():
        monitor.alert(note)
    advance(config.world_size)
    return learner
