"""Starts the actors of a run: the only place that knows which process gets which resources."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.cluster import ClusterInfo
from actors.elastic import Elastic
from actors.engine.adapters import AdapterSpec
from actors.engine.llm import EngineSpec
from actors.fleet import GeneratorFleet
from actors.generator_launch import GeneratorLauncher
from actors.judge_launch import JudgeLauncher
from actors.learner import LearnerGroup
from actors.learner_launch import learner_role, start_learner
from actors.placement import Patience, SharedPlaces, check, place_together, share
from actors.preflight import COLUMNS, Role, live_nodes, rows
from actors.relay import DIRECT, Relays
from actors.turns import LearnerParty
from actors.weights.outgoing import Publishing
from actors.weights.transport import OBJECT_STORE, pick_transport
from rlhf.config import RunConfig
from rlhf.config.colocate import sharing_gpu
from rlhf.config.judge import Judge as JudgeConfig
from rlhf.config.judge import single_judges, with_path
from rlhf.health import RestartBudget
from rlhf.learning.lora import adapter_shapes
from rlhf.ports import Judge, Monitor
from rlhf.rounds.turns import LEARNER, Turns, turn_of


@dataclass(frozen=True)
class Parts:
    """The started actors behind their ports."""

    fleet: GeneratorFleet
    judge: Judge
    eval_judge: Judge
    learner: LearnerGroup


class Launcher:
    """Places and starts the roles of one config on one cluster."""

    def __init__(self, config: RunConfig, cluster: ClusterInfo, model: str, shapes: dict[str, tuple[int, ...]]):
        self._config = config
        self._cluster = cluster
        self._model = model
        self._shapes = shapes
        self._deadline = config.cluster.deadlines.start
        self._gpu = cluster.device == "cuda"
        restarts = config.cluster.restarts
        self._budget = RestartBudget(restarts.budget, restarts.window_s)
        self.turns = Turns() if config.cluster.colocate else None
        """Who may use the devices; None where all have their own."""
        self._places: SharedPlaces | None = None
        self._elastic = config.generator.replicas.elastic and not cluster.private
        self._generator_launcher: GeneratorLauncher | None = None
        self.transport = pick_transport(config, cluster.device)
        self._adapters: AdapterSpec | None = None
        if config.sync.lora == "adapters" and (lora := config.learner.lora):
            self._shapes = adapter_shapes(config.policy, lora)
            self._adapters = AdapterSpec.of(lora.rank, lora.alpha, self._shapes)

    async def start(self, probes: Sequence[Sequence[int]], monitor: Monitor, run_dir: Path) -> Parts:
        """Start everything at once, or in turns; raises on the first actor that fails, naming it."""
        config = self._config
        tops = {"judge": config.judge} | ({"eval-judge": config.eval_judge} if config.eval_judge else {})
        judges = {name: with_path(judge, self._model) for name, judge in tops.items()}
        actors = sum(judge.replicas for top in judges.values() for _, judge in single_judges(top))
        total = config.generator.replicas.min + actors + config.learner.world_size
        with monitor.progress("load models", total) as bar:
            launcher = JudgeLauncher(
                self._cluster, config.cluster, config.seed, run_dir, monitor.alert, self._budget, self.turns
            )
            patience = Patience(self._deadline, config.cluster.grows, monitor.alert)
            sharing, alone = self._roles(launcher, judges)
            self._preflight(patience, monitor, [share(sharing), *alone] if sharing else alone)
            if sharing:
                self._places = await place_together(sharing, patience)
                launcher.share(self._places)
            # Who shares devices waits for its turn: the generators have the first one, the learner, whose work is
            # next, the last.
            async with asyncio.TaskGroup() as tasks:
                fleet = tasks.create_task(self._fleet(bar, monitor, patience))
                started = [
                    tasks.create_task(launcher.start(judge, name, bar.advance)) for name, judge in judges.items()
                ]
                learner = tasks.create_task(self._learner(bar, monitor, probes))
        return Parts(fleet.result(), started[0].result(), started[-1].result(), learner.result())

    @asynccontextmanager
    async def elastic(
        self, fleet: GeneratorFleet, check: Callable[[str], Awaitable[None]], monitor: Monitor
    ) -> AsyncIterator[None]:
        """While it is open, generators join and leave the fleet where the config has a range of them.

        `check` raises `RLHFError` for a node that is not as the others are.
        """
        if not self._elastic:
            yield
            return
        assert self._generator_launcher is not None
        self._generator_launcher.check = check
        replicas, deadline = self._config.generator.replicas, self._config.cluster.deadlines.generate
        async with asyncio.TaskGroup() as tasks:
            elastic = Elastic(fleet, self._generator_launcher, check, replicas, deadline, monitor.alert)
            task = tasks.create_task(elastic.run())
            try:
                yield
            finally:
                task.cancel()

    def _roles(self, launcher: JudgeLauncher, judges: dict[str, JudgeConfig]) -> tuple[list[Role], list[Role]]:
        """What all actors need: roles that share places, and roles that have places of their own."""
        roles = [self._generators(), self._ranks()]
        every = [role for name, judge in judges.items() for role in launcher.roles(judge, name)]
        if self.turns is None:
            return [], roles + every
        engines = [role for name, judge in judges.items() for role in launcher.engine_roles(judge, name)]
        return roles + engines, [role for role in every if role not in engines]

    def _preflight(self, patience: Patience, monitor: Monitor, roles: list[Role]) -> None:
        """Show what is asked of a cluster that others use too, and stop at once where that can never fit."""
        if not self._cluster.private:
            monitor.table("placement", COLUMNS, rows(roles, live_nodes()))
        check(roles, patience)

    async def _learner(self, bar: Any, monitor: Monitor, probes: Sequence[Sequence[int]]) -> LearnerGroup:
        config = self._config
        if self.turns and self._gpu:
            config = config.model_copy(update={"learner": sharing_gpu(config.learner)})
        async with turn_of(self.turns, LEARNER):
            learner = await start_learner(
                config, self._cluster, config.cluster.deadlines, self._budget, monitor, bar.advance,
                publishing=self._publishing(), probes=probes, placement=config.cluster.placement.learner,
                grows=config.cluster.grows, places=self._places,
            )  # fmt: skip
            if self.turns:
                self.turns.join(LEARNER, LearnerParty(learner))
        return learner

    def _publishing(self) -> Publishing:
        sync = self._config.sync
        return Publishing(
            self.transport,
            sync.bucket_mb << 20,
            sync.refresh_every if sync.sparse else None,
            self._adapters is not None,
        )

    def _generators(self) -> Role:
        config = self._config.generator
        cpus = self._cluster.reserved(self._cluster.threads(config.cpus, config.replicas.most(self._cluster.private)))
        role = Role("generator", config.replicas.min, cpus, config.tensor_parallel if self._gpu else 0, "PACK")
        return role.placed(self._config.cluster.placement.generator)

    def _ranks(self) -> Role:
        return learner_role(self._config.learner, self._cluster, self._config.cluster.placement.learner)

    def _engine(self) -> EngineSpec:
        config = self._config.generator
        return EngineSpec(
            model=self._model,
            dtype=self._config.policy.dtype,
            max_length=self._config.prompts.max_tokens + config.sampling.max_tokens,
            tensor_parallel=config.tensor_parallel,
            device=self._cluster.device,
            seed=self._config.seed,
            trust_remote_code=self._config.policy.trust_remote_code,
            arguments=config.engine,
            transport=self.transport,
            adapters=self._adapters,
            sync_s=self._config.cluster.deadlines.sync,
            sleeps=self.turns is not None,
        )

    async def _fleet(self, bar: Any, monitor: Monitor, patience: Patience) -> GeneratorFleet:
        config = self._config.generator
        most = config.replicas.most(self._cluster.private)
        threads = self._cluster.threads(config.cpus, most)
        # The other transports' updates are between learner and generators alone; a group that shares GPUs is small.
        relayed = self.transport == OBJECT_STORE and self.turns is None and most > DIRECT
        self._generator_launcher = GeneratorLauncher(
            config, self._generators(), self._engine(), self._shapes, threads, self._config.cluster.deadlines, patience,
            self.turns, Relays(monitor.alert) if relayed else None,
        )  # fmt: skip
        return await self._generator_launcher.start(
            self._elastic, self._places, bar.advance, self._budget, monitor, self._config.rounds.lookahead > 0
        )
