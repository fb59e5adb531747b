"""The judge pool: Ray actors shared by all generators, fed with batches gathered over prompts."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from actors.calls import ActorDiedError, NoAnswerError, first_line, within
from actors.engine.sleeping import KEEP_WEIGHTS
from actors.reviving import revive
from rlhf.config.judge import EngineJudge, PooledJudge
from rlhf.errors import EngineLostError, RLHFError
from rlhf.health import Health, RestartBudget, State
from rlhf.judging.build import build_judge
from rlhf.judging.verdicts import check_complete
from rlhf.ports import Rewarder, Scorer
from rlhf.records import Comparison, Verdict
from rlhf.wire import Findings, PackedComparisons, PackedVerdicts

if TYPE_CHECKING:
    from actors.engine.llm import EngineSpec

T = TypeVar("T")


@dataclass(frozen=True)
class ActorEngines:
    """The `JudgeEngines` port: engines inside this process."""

    device: str
    seed: int
    sleeps: bool = False
    """Do they share the device, and sleep between their turns?"""
    started: list[Any] = field(default_factory=list)
    """Engines of vLLM, which have processes of their own."""
    held: list[Any] = field(default_factory=list)
    """All engines."""

    def scorer(self, config: EngineJudge) -> Scorer:
        """vLLM, or transformers where the config says so."""
        if config.backend == "transformers":
            from rlhf.judging.transformers_engine import TransformersScorer

            return self._hold(TransformersScorer(config, self.device))
        from actors.engine.llm import Engine

        engine = Engine(self._spec(config, config.max_length + 1))  # one more for the answer
        self.started.append(engine)
        return self._hold(engine)

    def rewarder(self, config: EngineJudge) -> Rewarder:
        """vLLM's pooling runner, or transformers where the config says so."""
        if config.backend == "transformers":
            from rlhf.judging.transformers_engine import TransformersRewarder

            return self._hold(TransformersRewarder(config, self.device))
        from actors.engine.pooling import PoolingEngine

        engine = PoolingEngine(self._spec(config, config.max_length))
        self.started.append(engine)
        return self._hold(engine)

    def _hold(self, engine: T) -> T:
        self.held.append(engine)
        return engine

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
            sleeps=self.sleeps,
        )


class JudgeActor:
    """One judge; a judge that needs an engine holds it in this actor."""

    def __init__(self, config: PooledJudge, device: str, seed: int, sleeps: bool = False):
        """`sleeps` says that the judge's engines share their device."""
        self._engines = ActorEngines(device, seed, sleeps)
        self._judge = build_judge(config, self._engines)
        self._awake = True
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> str:
        """The node's id once the judge is ready."""
        return ray.get_runtime_context().get_node_id()

    async def compare(self, comparisons: list[Comparison]) -> PackedVerdicts:
        """One verdict a comparison, in order; what arrives are `Findings`."""
        if not self._awake:
            raise RuntimeError("the judge is asleep: somebody else has the turn")
        self._running += 1
        self._idle.clear()
        try:
            return PackedVerdicts(await self._judge.compare(comparisons))
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def sleep(self) -> None:
        """Give the device's memory back, once the comparisons that nobody waits for any more have ended."""
        self._awake = False
        await self._idle.wait()
        for engine in self._engines.held:
            await engine.sleep(KEEP_WEIGHTS)

    async def wake(self) -> None:
        """Take the device's memory again."""
        for engine in self._engines.held:
            await engine.wake()
        self._awake = True

    def shutdown(self) -> None:
        """Stop the engine's own processes; nothing can be asked of it afterwards."""
        for engine in self._engines.started:
            engine.shutdown()


@dataclass
class _Batch:
    comparisons: list[Comparison] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Full, or old enough to go to a slot that is free."""
    done: "asyncio.Future[list[Verdict]]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(frozen=True, eq=False)
class _Slot:
    """One of the two batches that an actor may have; void once the actor was replaced."""

    index: int
    handle: Any


class JudgePool:
    """The `Judge` port over the actors.

    Calls are joined into batches of up to `batch_size`: a batch grows until it is full or an actor takes it, so what
    comes in while all are busy shares one. An actor has at most two batches, so that it never waits and work goes to
    whichever is free. One that dies, or does not answer in time, is started again out of the restart budget; its
    batches go to others meanwhile.
    """

    LINGER_S = 0.005
    """How long a batch waits for more although an actor is free: prompts finish in bursts."""

    ATTEMPTS = 3
    """Actors that one batch may cost before it counts as the cause."""

    def __init__(
        self,
        handles: Sequence[Any],
        batch_size: int,
        deadline: float,
        name: str = "judge",
        restart: Callable[[int], Awaitable[Any]] | None = None,
        budget: RestartBudget | None = None,
        alert: Callable[[str], None] = lambda message: None,
    ):
        """`name` is the prefix of the actors' names; an actor has `deadline` seconds for a batch.

        `restart` puts a new actor in the place of a number; without it whatever goes wrong is raised. Each restart
        takes from `budget` and is told to `alert`.
        """
        self._batch_size = batch_size
        self._deadline = deadline
        self._name = name
        self._handles = list(handles)
        self._restart = restart
        self._budget = budget or RestartBudget(5, 3600.0)
        self._alert = alert
        self._healths = [self._healthy() for _ in self._handles]
        self._failure: RLHFError | None = None
        self._free: asyncio.Queue[_Slot | None] = asyncio.Queue()
        for _ in range(2):
            for index in range(len(self._handles)):
                self._free.put_nowait(_Slot(index, self._handles[index]))
        self._open: _Batch | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; raises `RLHFError` when no actor is left to ask."""
        parts = []
        given = 0
        while given < len(comparisons):
            batch = self._open
            if batch is None:
                batch = self._open = _Batch()
                self._spawn(self._judge(batch))
            start = len(batch.comparisons)
            batch.comparisons += comparisons[given : given + self._batch_size - start]
            end = len(batch.comparisons)
            given += end - start
            parts.append((batch, start, end))
            if end == self._batch_size:
                self._open = None
                batch.ready.set()
        verdicts: list[Verdict] = []
        for batch, start, end in parts:
            # Shielded: the batch is shared, and a caller that is stopped must not stop the others.
            verdicts += (await asyncio.shield(batch.done))[start:end]
        return verdicts

    async def _judge(self, batch: _Batch) -> None:
        try:
            batch.done.set_result(await self._verdicts(batch))
        except BaseException as error:
            batch.done.set_exception(error)
            batch.done.exception()  # fetched once: asyncio logs an error that no caller is left to take

    async def _verdicts(self, batch: _Batch) -> list[Verdict]:
        slot = await self._slot(batch)
        if self._open is batch:
            self._open = None
        for attempt in itertools.count(1):
            try:
                what = f"{self._name}-{slot.index}: {len(batch.comparisons)} comparisons"
                call = slot.handle.compare.remote(PackedComparisons(batch.comparisons))
                return _completed(await within(call, self._deadline, what), batch.comparisons)
            except (ActorDiedError, NoAnswerError, EngineLostError) as error:
                if self._restart is None:
                    raise
                self._lost(slot, str(error))
                if attempt == self.ATTEMPTS:
                    raise RLHFError(f"{error}; {attempt} actors were lost over the same comparisons") from error
            finally:
                if self._handles[slot.index] is slot.handle:
                    self._free.put_nowait(slot)
            slot = await self._next_slot()
        raise AssertionError

    async def _slot(self, batch: _Batch) -> _Slot:
        """A slot for the batch, which stays open while it waits for one."""
        if not self._free.empty():
            asyncio.get_running_loop().call_later(self.LINGER_S, batch.ready.set)
            await batch.ready.wait()
        return await self._next_slot()

    async def _next_slot(self) -> _Slot:
        """The slot that is free next, of an actor that is there; raises `RLHFError` when none will be."""
        while True:
            slot = await self._free.get()
            if self._failure:
                self._free.put_nowait(None)  # for whoever waits beside
                raise self._failure
            if slot and self._handles[slot.index] is slot.handle:
                return slot

    def running(self) -> dict[int, Any]:
        """The actors that are there, by number."""
        return {index: handle for index, handle in enumerate(self._handles) if handle is not None}

    def lost(self, index: int, handle: Any, reason: str) -> None:
        """The actor behind `handle` is gone or useless: another one takes its place, in the background."""
        self._lost(_Slot(index, handle), reason)

    def _healthy(self) -> Health:
        health = Health(self._budget, self._deadline)
        health.proved(0)
        return health

    def _lost(self, slot: _Slot, reason: str) -> None:
        """The actor behind a slot is gone or useless: another one takes its place, in the background."""
        if self._handles[slot.index] is slot.handle:
            self._handles[slot.index] = None
            self._healths[slot.index].died(reason)
            self._spawn(self._come_back(slot.index))

    async def _come_back(self, index: int) -> None:
        """Start an actor until one is ready. It answers when its model is loaded, which is all there is to prove."""
        health, name, restart = self._healths[index], f"{self._name}-{index}", self._restart
        assert restart is not None
        try:
            handle = await revive(name, health, self._budget, lambda: restart(index), self._alert)
        except Exception as error:
            self._fail(RLHFError(f"{name}: {first_line(error)}"), error)
            return
        if handle is not None:
            health.proved(0)
            self._handles[index] = handle
            for _ in range(2):
                self._free.put_nowait(_Slot(index, handle))
        elif all(each.state == State.RETIRED for each in self._healths):
            self._fail(RLHFError(f"no {self._name} is left: {health.reason}"))

    def _fail(self, failure: RLHFError, cause: BaseException | None = None) -> None:
        """Nobody can be asked any more: whoever waits for a slot, or will, gets the error."""
        failure.__cause__ = cause
        self._failure = failure
        self._free.put_nowait(None)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _completed(answer: Findings | Sequence[Verdict] | None, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """The verdicts of an answer: an actor sends findings, since the comparisons are here."""
    if isinstance(answer, Findings):
        return answer.verdicts(comparisons)
    check_complete(comparisons, answer or ())
    return list(answer or ())
