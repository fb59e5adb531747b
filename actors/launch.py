"""Starts the actors of a run: the only place that knows which process gets which resources."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.calls import within
from actors.cluster import ClusterInfo
from actors.engine.adapters import AdapterSpec
from actors.engine.llm import EngineSpec, engine_environment
from actors.fleet import GeneratorFleet
from actors.generator import GeneratorActor
from actors.judge_launch import JudgeLauncher
from actors.learner import LearnerGroup
from actors.learner_launch import start_learner
from actors.placement import Role, actor_options, place, stop
from actors.weights.outgoing import Publishing
from actors.weights.transport import pick_transport
from rlhf.config import RunConfig
from rlhf.config.judge import single_judges, with_path
from rlhf.health import RestartBudget
from rlhf.learning.lora import adapter_shapes
from rlhf.ports import Judge, Monitor

CONCURRENCY = 10_000
"""Calls an async actor takes at once; vLLM itself bounds what runs."""


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
        self.transport = pick_transport(config, cluster.device)
        self._adapters: AdapterSpec | None = None
        if config.sync.lora == "adapters" and (lora := config.learner.lora):
            self._shapes = adapter_shapes(config.policy, lora)
            self._adapters = AdapterSpec.of(lora.rank, lora.alpha, self._shapes)

    async def start(self, probes: list[tuple[int, ...]], monitor: Monitor, run_dir: Path) -> Parts:
        """Start everything at once; raises on the first actor that fails, naming it."""
        config = self._config
        judges = {"judge": config.judge} | ({"eval-judge": config.eval_judge} if config.eval_judge else {})
        actors = sum(judge.replicas for top in judges.values() for _, judge in single_judges(top))
        total = config.generator.replicas + actors + config.learner.world_size
        with monitor.progress("load models", total) as bar:
            async with asyncio.TaskGroup() as tasks:
                learner = tasks.create_task(
                    start_learner(
                        config, self._cluster, config.cluster.deadlines, self._budget, monitor, bar.advance,
                        publishing=self._publishing(), probes=probes,
                    )
                )  # fmt: skip
                fleet = tasks.create_task(self._fleet(bar, monitor))
                launcher = JudgeLauncher(
                    self._cluster, config.cluster, config.seed, run_dir, monitor.alert, self._budget
                )
                started = [
                    tasks.create_task(launcher.start(with_path(judge, self._model), name, bar.advance))
                    for name, judge in judges.items()
                ]
        return Parts(fleet.result(), started[0].result(), started[-1].result(), learner.result())

    def _publishing(self) -> Publishing:
        sync = self._config.sync
        return Publishing(
            self.transport,
            sync.bucket_mb << 20,
            sync.refresh_every if sync.sparse else None,
            self._adapters is not None,
        )

    async def _fleet(self, bar: Any, monitor: Monitor) -> GeneratorFleet:
        config = self._config.generator
        threads = self._cluster.threads(config.cpus, config.replicas)
        role = Role(
            "generator",
            config.replicas,
            self._cluster.reserved(threads),
            config.tensor_parallel if self._gpu else 0,
            "PACK",
        )
        group = await place(role, self._deadline)
        names = [f"generator-{index}" for index in range(config.replicas)]
        spec = EngineSpec(
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
        )

        environment = engine_environment(self._cluster.device, threads)
        actor = ray.remote(GeneratorActor)

        async def launch(name: str) -> Any:
            options = actor_options(name, group, names.index(name), role, environment)
            handle: Any = actor.options(**options, max_concurrency=CONCURRENCY).remote(name, spec, self._shapes)
            await within(handle.start.remote(), self._deadline, f"{name}: loading the model")
            return handle

        async def first(name: str) -> Any:
            handle = await launch(name)
            bar.advance()
            return handle

        async def restart(name: str) -> Any:
            await stop(name, orderly=self._gpu)
            return await launch(name)

        handles = await asyncio.gather(*(first(name) for name in names))
        return GeneratorFleet(
            dict(zip(names, handles, strict=True)),
            config.sampling.model_dump(),
            int(config.engine.get("max_num_seqs", 128 if self._cluster.device == "cpu" else 256)),
            restart,
            self._budget,
            self._config.cluster.deadlines.token,
            monitor.alert,
            publishes_meanwhile=self._config.rounds.lookahead > 0,
        )
