"""Starts judges: a pool of actors each, an ensemble over several pools."""

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from actors.calls import within
from actors.cluster import ClusterInfo
from actors.engine.llm import engine_environment
from actors.judge import JudgeActor, JudgePool
from actors.placement import Patience, SharedPlaces, actor_options, seat, stop
from actors.preflight import Role
from actors.turns import PoolParty
from rlhf.config.judge import EngineJudge, EnsembleJudge, PooledJudge, single_judges
from rlhf.config.judge import Judge as JudgeConfig
from rlhf.config.system import Cluster
from rlhf.health import RestartBudget
from rlhf.judging.cache import CachedJudge, judge_identity
from rlhf.judging.ensemble import EnsembleJudge as Ensemble
from rlhf.modelfiles import local_folder
from rlhf.ports import Judge
from rlhf.rounds.in_turn import InTurnJudge
from rlhf.rounds.turns import Turns, turn_of

CONCURRENCY = 10_000
"""Calls an async actor takes at once; the pool bounds what runs."""


class JudgeLauncher:
    """Places and starts judges on one cluster; verdict caches go to `run_dir`, none without one."""

    def __init__(
        self,
        cluster: ClusterInfo,
        options: Cluster,
        seed: int,
        run_dir: Path | None,
        alert: Callable[[str], None],
        budget: RestartBudget | None = None,
        turns: Turns | None = None,
    ):
        """Restarts take from `budget`, by default one of their own. With `turns` judges with engines take them."""
        self._turns = turns
        self._places: SharedPlaces | None = None
        self._cluster = cluster
        self._deadlines = options.deadlines
        self._placement = options.placement.judge
        self._patience = Patience(options.deadlines.start, options.grows, alert)
        self._seed = seed
        self._run_dir = run_dir
        self._alert = alert
        self._budget = budget or RestartBudget(options.restarts.budget, options.restarts.window_s)

    def share(self, places: SharedPlaces) -> None:
        """Judges with engines are started in these places."""
        self._places = places

    def roles(self, config: JudgeConfig, name: str) -> list[Role]:
        """What all actors need, by pool."""
        return [self._role(judge, pool)[0] for pool, judge in self._pools(config, name)]

    def engine_roles(self, config: JudgeConfig, name: str) -> list[Role]:
        """What the actors with engines need, by pool."""
        return [
            self._role(judge, pool)[0] for pool, judge in self._pools(config, name) if isinstance(judge, EngineJudge)
        ]

    def _pools(self, config: JudgeConfig, name: str) -> list[tuple[str, PooledJudge]]:
        names = (f"{name}-{index}" for index in itertools.count()) if isinstance(config, EnsembleJudge) else [name]
        return [(pool, judge) for pool, (_, judge) in zip(names, single_judges(config), strict=False)]

    async def start(self, config: JudgeConfig, name: str, advance: Callable[[], None]) -> Judge:
        """The judge behind its port; `name` is its actors' prefix, `advance` is called as each actor is ready."""
        if not isinstance(config, EnsembleJudge):
            return await self._pool(config, name, advance)
        members = await asyncio.gather(
            *(self._pool(member.judge, f"{name}-{index}", advance) for index, member in enumerate(config.members))
        )
        weights = [member.weight for member in config.members]
        return Ensemble(list(zip(members, weights, strict=True)), config.method, config.quorum)

    async def _pool(self, config: PooledJudge, name: str, advance: Callable[[], None]) -> Judge:
        if isinstance(config, EngineJudge):
            assert config.path is not None
            config = config.model_copy(update={"path": str(local_folder(config.path, "judge.path").resolve())})
        turns = self._turns if isinstance(config, EngineJudge) else None
        role, environment = self._role(config, name)
        role, group = await seat(role, self._patience, self._places if turns else None)
        actor = ray.remote(JudgeActor)

        async def launch(index: int) -> Any:
            options = actor_options(f"{name}-{index}", group, index, role, environment)
            handle: Any = actor.options(**options, max_concurrency=CONCURRENCY).remote(
                config, self._cluster.device, self._seed, turns is not None
            )
            await within(handle.start.remote(), self._deadlines.start, f"{name}-{index}: loading the judge")
            return handle

        async def first(index: int) -> Any:
            handle = await launch(index)
            advance()
            return handle

        async def end(actor_name: str) -> None:
            await stop(actor_name, self._cluster.device == "cuda" and isinstance(config, EngineJudge))

        async def restart(index: int) -> Any:
            await end(f"{name}-{index}")
            async with turn_of(turns, name):
                return await launch(index)

        async with turn_of(turns, name):
            handles = await asyncio.gather(*(first(index) for index in range(config.replicas)))
            pool = JudgePool(
                handles, config.batch_size, self._deadlines.judge, name, restart, self._budget, self._alert
            )
            if turns:
                turns.join(name, PoolParty(pool, name, end, self._deadlines.judge))
        judge: Judge = InTurnJudge(pool, turns, name) if turns else pool
        if self._run_dir is None or not config.cache:
            return judge
        return CachedJudge(judge, self._run_dir / "verdicts" / f"{name}.sqlite", judge_identity(config), self._alert)

    def _role(self, config: PooledJudge, name: str) -> tuple[Role, dict[str, str]]:
        if not isinstance(config, EngineJudge):
            threads = config.cpus or 1
            role = Role(name, config.replicas, self._cluster.reserved(threads), 0, "SPREAD")
            return role.placed(self._placement), {"OMP_NUM_THREADS": str(threads)}
        threads = self._cluster.threads(config.cpus, config.replicas)
        gpus = config.tensor_parallel if self._cluster.device == "cuda" else 0
        role = Role(name, config.replicas, self._cluster.reserved(threads), gpus, "SPREAD")
        return role.placed(self._placement), engine_environment(self._cluster.device, threads)
