"""Starts the actors of a run: the only place that knows which process gets which resources."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from actors.calls import within
from actors.cluster import ClusterInfo
from actors.engine.llm import EngineSpec, engine_environment
from actors.fleet import GeneratorFleet
from actors.generator import GeneratorActor
from actors.judge import JudgeActor, JudgePool
from actors.learner import LearnerActor, LearnerGroup
from actors.placement import Role, place, scheduling
from actors.weights.transport import pick_transport
from rlhf.config import RunConfig
from rlhf.config.judge import Judge as JudgeConfig
from rlhf.config.judge import PairModelJudge
from rlhf.errors import RLHFError
from rlhf.modelfiles import local_folder
from rlhf.ports import Monitor
from rlhf.rounds.run_directory import cores

CONCURRENCY = 10_000
"""Calls an async actor takes at once; vLLM itself bounds what runs."""

SHUTDOWN_S = 60.0
"""What a generator that is to be replaced may take to stop its engine before it is killed."""


@dataclass(frozen=True)
class Parts:
    """The started actors behind their ports."""

    fleet: GeneratorFleet
    judge: JudgePool
    eval_judge: JudgePool
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
        self.transport = pick_transport(config, cluster.device)

    async def start(self, probes: list[tuple[int, ...]], monitor: Monitor) -> Parts:
        """Start everything at once; raises on the first actor that fails, naming it."""
        config = self._config
        evals = config.eval_judge
        judges = config.judge.replicas + (evals.replicas if evals else 0)
        total = config.generator.replicas + judges + config.learner.world_size
        with monitor.progress("load models", total) as bar:
            async with asyncio.TaskGroup() as tasks:
                learner = tasks.create_task(self._learner(probes, monitor, bar))
                fleet = tasks.create_task(self._fleet(bar))
                judge = tasks.create_task(self._judge(config.judge, "judge", bar))
                other = tasks.create_task(self._judge(evals, "eval-judge", bar)) if evals else judge
        return Parts(fleet.result(), judge.result(), other.result(), learner.result())

    def _threads(self, asked: int | None, share: int = 1) -> int:
        """Threads of an actor: as asked, else the local machine's cores shared among `share` actors, else 4."""
        if asked is not None:
            return asked
        return max(1, cores() // share) if self._cluster.private and not self._gpu else 4

    def _reserved(self, threads: int) -> int:
        """CPUs that an actor reserves: on a private Ray the actors take turns on the same cores."""
        return 1 if self._cluster.private else threads

    async def _fleet(self, bar: Any) -> GeneratorFleet:
        config = self._config.generator
        threads = self._threads(config.cpus, config.replicas)
        role = Role(
            "generator", config.replicas, self._reserved(threads), config.tensor_parallel if self._gpu else 0, "PACK"
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
        )

        environment = engine_environment(self._cluster.device, threads)
        actor = ray.remote(GeneratorActor)

        async def launch(name: str) -> Any:
            options = self._options(name, group, names.index(name), role, environment)
            handle: Any = actor.options(**options, max_concurrency=CONCURRENCY).remote(name, spec, self._shapes)
            await within(handle.start.remote(), self._deadline, f"{name}: loading the model")
            bar.advance()
            return handle

        async def restart(name: str) -> Any:
            with suppress(ValueError):  # It may have died by itself.
                old = ray.get_actor(name)
                if self._gpu:
                    # The engine's processes hold the GPU and would outlive the actor by seconds.
                    with suppress(RLHFError):
                        await within(old.shutdown.remote(), SHUTDOWN_S, f"{name}: stopping the engine")
                ray.kill(old)
            return await launch(name)

        handles = await asyncio.gather(*(launch(name) for name in names))
        sequences = int(config.engine.get("max_num_seqs", 128 if self._cluster.device == "cpu" else 256))
        return GeneratorFleet(dict(zip(names, handles, strict=True)), config.sampling.model_dump(), sequences, restart)

    async def _judge(self, config: JudgeConfig, name: str, bar: Any) -> JudgePool:
        spec = self._judge_engine(config) if isinstance(config, PairModelJudge) else None
        threads = self._threads(config.cpus, config.replicas) if spec else (config.cpus or 1)
        gpus = config.tensor_parallel if isinstance(config, PairModelJudge) and self._gpu else 0
        role = Role(name, config.replicas, self._reserved(threads), gpus, "SPREAD")
        group = await place(role, self._deadline)
        environment = engine_environment(self._cluster.device, threads) if spec else {"OMP_NUM_THREADS": str(threads)}

        actor = ray.remote(JudgeActor)

        async def launch(index: int) -> Any:
            options = self._options(f"{name}-{index}", group, index, role, environment)
            trust = isinstance(config, PairModelJudge) and config.trust_remote_code
            handle: Any = actor.options(**options, max_concurrency=CONCURRENCY).remote(config, spec, trust)
            await within(handle.start.remote(), self._deadline, f"{name}-{index}: loading the judge")
            bar.advance()
            return handle

        handles = await asyncio.gather(*(launch(index) for index in range(config.replicas)))
        return JudgePool(handles, config.batch_size, self._config.cluster.deadlines.judge)

    def _judge_engine(self, config: PairModelJudge) -> EngineSpec:
        return EngineSpec(
            model=str(local_folder(config.path, "judge.path").resolve()) if config.path else self._model,
            dtype=config.dtype,
            max_length=config.max_length + 1,
            tensor_parallel=config.tensor_parallel,
            device=self._cluster.device,
            seed=self._config.seed,
            trust_remote_code=config.trust_remote_code,
            arguments=config.engine,
            transport=None,
        )

    async def _learner(self, probes: list[tuple[int, ...]], monitor: Monitor, bar: Any) -> LearnerGroup:
        config = self._config.learner
        threads = self._threads(config.cpus, config.world_size)
        role = Role("learner", config.world_size, self._reserved(threads), 1 if self._gpu else 0, "PACK")
        group = await place(role, self._deadline)
        environment = {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR"}
        actor = ray.remote(LearnerActor)
        handles = [
            actor.options(**self._options(f"learner-{rank}", group, rank, role, environment)).remote(
                self._config, rank, config.world_size, self._cluster.device, self.transport
            )
            for rank in range(config.world_size)
        ]
        learner = LearnerGroup(handles, self._config.cluster.deadlines, probes)
        for note in await learner.start():
            monitor.alert(note)
        bar.advance(config.world_size)
        return learner

    def _options(
        self, name: str, group: PlacementGroup, index: int, role: Role, environment: dict[str, str]
    ) -> dict[str, Any]:
        return {
            "name": name,
            "num_cpus": role.cpus,
            "num_gpus": role.gpus,
            "scheduling_strategy": scheduling(group, index),
            "runtime_env": {"env_vars": environment},
        }
