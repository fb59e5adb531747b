"""Starts the learner's ranks."""

from collections.abc import Callable, Sequence

import ray

from actors.cluster import ClusterInfo
from actors.learner import LearnerActor, LearnerGroup
from actors.placement import Role, actor_options, place
from actors.weights.outgoing import Publishing
from rlhf.config.system import Deadlines
from rlhf.learning.job import LearnerJob
from rlhf.ports import Monitor


async def start_learner(
    job: LearnerJob,
    cluster: ClusterInfo,
    deadlines: Deadlines,
    monitor: Monitor,
    advance: Callable[[int], None],
    *,
    publishing: Publishing | None = None,
    probes: Sequence[tuple[int, ...]] = (),
) -> LearnerGroup:
    """The ranks behind the `Learner` port, met and with their models loaded; `probes` prove published weights."""
    config, gpu = job.learner, cluster.device == "cuda"
    threads = cluster.threads(config.cpus, config.world_size)
    role = Role("learner", config.world_size, cluster.reserved(threads), 1 if gpu else 0, "PACK")
    group = await place(role, deadlines.start)
    environment = {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR"}
    actor = ray.remote(LearnerActor)
    handles = [
        actor.options(**actor_options(f"learner-{rank}", group, rank, role, environment)).remote(
            job, rank, config.world_size, cluster.device, publishing or Publishing()
        )
        for rank in range(config.world_size)
    ]
    learner = LearnerGroup(handles, deadlines, probes)
    for note in await learner.start():
        monitor.alert(note)
    advance(config.world_size)
    return learner
