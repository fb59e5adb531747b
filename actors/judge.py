"""The judge pool: Ray actors shared by all generators, fed with batches gathered over prompts."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from actors.calls import within
from rlhf.config.judge import EngineJudge, PooledJudge
from rlhf.judging.build import build_judge
from rlhf.judging.verdicts import check_complete
from rlhf.ports import Rewarder, Scorer
from rlhf.records import Comparison, Verdict

if TYPE_CHECKING:
    from actors.engine.llm import EngineSpec


@dataclass(frozen=True)
class ActorEngines:
    """The `JudgeEngines` port: engines inside this process."""

    device: str
    seed: int

    def scorer(self, config: EngineJudge) -> Scorer:
        """vLLM, or transformers where the config says so."""
        if config.backend == "transformers":
            from rlhf.judging.transformers_engine import TransformersScorer

            return TransformersScorer(config, self.device)
        from actors.engine.llm import Engine

        return Engine(self._spec(config, config.max_length + 1))  # one more for the answer

    def rewarder(self, config: EngineJudge) -> Rewarder:
        """vLLM's pooling runner, or transformers where the config says so."""
        if config.backend == "transformers":
            from rlhf.judging.transformers_engine import TransformersRewarder

            return TransformersRewarder(config, self.device)
        from actors.engine.pooling import PoolingEngine

        return PoolingEngine(self._spec(config, config.max_length))

    def _spec(self, config: EngineJudge, max_length: int) -> "EngineSpec":
        from actors.engine.llm import EngineSpec

        assert config.path is not None
        return EngineSpec(
            model=config.path,
            dtype=config.dtype,
            max_length=max_length,
            tensor_parallel=config.tensor_parallel,
            device=self.device,
            seed=self.seed,
            trust_remote_code=config.trust_remote_code,
            arguments=config.engine,
            transport=None,
        )


class JudgeActor:
    """One judge; a judge that needs an engine holds it in this actor."""

    def __init__(self, config: PooledJudge, device: str, seed: int):
        self._judge = build_judge(config, ActorEngines(device, seed))

    async def start(self) -> str:
        """The node's id once the judge is ready."""
        return ray.get_runtime_context().get_node_id()

    async def compare(self, comparisons: list[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order."""
        return await self._judge.compare(comparisons)


@dataclass
class _Batch:
    comparisons: list[Comparison] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Full, or old enough to go to a slot that is free."""
    done: "asyncio.Future[list[Verdict]]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class JudgePool:
    """The `Judge` port over the actors.

    Calls are joined into batches of up to `batch_size`: a batch grows until it is full or an actor takes it, so what
    comes in while all are busy shares one. An actor has at most two batches, so that it never waits and work goes to
    whichever is free.
    """

    LINGER_S = 0.005
    """How long a batch waits for more although an actor is free: prompts finish in bursts."""

    def __init__(self, handles: Sequence[Any], batch_size: int, deadline: float, name: str = "judge"):
        """`name` is the prefix of the actors' names; an actor has `deadline` seconds for a batch."""
        self._batch_size = batch_size
        self._deadline = deadline
        self._name = name
        self._handles = list(handles)
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(2 * len(self._handles)):
            self._free.put_nowait(slot % len(self._handles))
        self._open: _Batch | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; raises `DeadlineError` if an actor does not answer in time."""
        parts = []
        for comparison in comparisons:
            batch = self._open
            if batch is None:
                batch = self._open = _Batch()
                self._spawn(self._judge(batch))
            parts.append((batch, len(batch.comparisons)))
            batch.comparisons.append(comparison)
            if len(batch.comparisons) == self._batch_size:
                self._open = None
                batch.ready.set()
        # Shielded: the batch is shared, and a caller that is stopped must not stop the others.
        return [(await asyncio.shield(batch.done))[index] for batch, index in parts]

    async def _judge(self, batch: _Batch) -> None:
        index = await self._slot(batch)
        if self._open is batch:
            self._open = None
        try:
            what = f"{self._name}-{index}: {len(batch.comparisons)} comparisons"
            verdicts = await within(self._handles[index].compare.remote(batch.comparisons), self._deadline, what)
            check_complete(batch.comparisons, verdicts or ())
            batch.done.set_result(verdicts)
        except BaseException as error:
            batch.done.set_exception(error)
            batch.done.exception()  # fetched once: asyncio logs an error that no caller is left to take
        finally:
            self._free.put_nowait(index)

    async def _slot(self, batch: _Batch) -> int:
        """The actor that judges the batch, which stays open while it waits for one."""
        if not self._free.empty():
            asyncio.get_running_loop().call_later(self.LINGER_S, batch.ready.set)
            await batch.ready.wait()
        return await self._free.get()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
