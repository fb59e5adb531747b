"""A generator: one vLLM engine in a Ray actor that samples, takes weight updates and proves them."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray

from actors.calls import in_batches
from actors.engine.ipc import staging_info
from actors.engine.llm import Engine, EngineSpec
from actors.engine.plugin import NCCL
from actors.engine.sleeping import DROP_WEIGHTS, WEIGHTS
from actors.weights.ipc import DeviceBuffer
from actors.weights.nccl import NcclGroup, update_info
from actors.weights.probe import ProbeError, probe_error
from rlhf.errors import EngineLostError, PayloadError
from rlhf.records import Bucket, Probe, Rollout, SampleRequest, WeightManifest
from rlhf.wire import PackedRollouts

LINGER_S = 0.01
"""How long a response waits for others to travel with: a stream's item costs the driver more than what it holds."""


class GeneratorActor:
    """Serves one version at a time; an engine whose load or probe failed never serves again."""

    def __init__(self, name: str, spec: EngineSpec, expected: dict[str, tuple[int, ...]]):
        self._name = name
        self._engine = Engine(spec)
        self._transport = spec.transport
        self._expected = expected
        self._references: list[ray.ObjectRef] = []
        self._version: int | None = None
        self._failure: str | None = None
        # Versions that wrote a token and have been proved; each update, however it ends, wakes who waits for it.
        self._proved: set[int] = set()
        self._settled = asyncio.Event()
        self._updates = 0
        # One update at a time: after a lost relay it is sent again while the first one goes on.
        self._turn = asyncio.Lock()
        self._polls = 0
        self._names = itertools.count()

    async def start(self) -> str:
        """Connect the engine's workers to the cluster if they need it; returns the node's id once the model serves."""
        context = ray.get_runtime_context()
        if self._transport != NCCL:
            await self._engine.connect(context.gcs_address, context.namespace, self._name, self._expected)
        return context.get_node_id()

    async def sample(self, requests: list[SampleRequest], sampling: dict[str, Any]) -> AsyncIterator[list[Rollout]]:
        """Yield responses as they end, those of a few milliseconds together; the engine batches all requests.

        Raises `EngineLostError` if the engine has to be replaced; what was yielded before is good.
        """
        if self._failure or self._version is None:
            raise EngineLostError(f"{self._name} serves no proved version: {self._failure or 'no update yet'}")
        if not self._engine.awake:
            raise RuntimeError(f"{self._name} is asleep: somebody else has the turn")
        tasks = [
            asyncio.create_task(self._proved_response(request, k, sampling))
            for request in requests
            for k in range(len(request.seeds))
        ]
        try:
            async for ended in in_batches(tasks, LINGER_S):
                yield PackedRollouts(ended)
        finally:
            for task in tasks:
                task.cancel()

    async def _proved_response(self, request: SampleRequest, k: int, sampling: dict[str, Any]) -> Rollout:
        """Sample response `k` and hold it back until every version that wrote a token of it has been proved.

        An update lets running sequences go on under the new weights before the probe has passed judgement on them.
        """
        name = f"{request.prompt.uid}-{k}-{next(self._names)}"
        rollout = await self._engine.sample(request, k, sampling, name)
        while unproved := {span.version for span in rollout.versions} - self._proved:
            if self._failure:
                raise EngineLostError(f"{self._name}: {self._failure}")
            if not self._updates:
                raise RuntimeError(f"{self._name}: tokens of version {min(unproved)}, which nobody sent")
            await self._settled.wait()
        return rollout

    def node(self) -> str:
        """The id of this actor's node."""
        return ray.get_runtime_context().get_node_id()

    def progress(self) -> int:
        """A number that grows with every token sampled, and with every call while weights are updated.

        An update stops sampling and has a deadline of its own.
        """
        if self._updates:
            self._polls += 1
        return self._engine.tokens() + self._polls

    def staged_references(self) -> list[ray.ObjectRef]:
        """The buffers of the payload being staged; the engine's workers ask for them."""
        return self._references

    async def update(self, manifest: WeightManifest, verify: bool, tolerance: float) -> float:
        """Stage, check, load and prove a version; returns the probe's largest mean |log-prob difference|.

        Raises `PayloadError` if the engine was not touched (the old version still serves) and `EngineLostError` if
        it has to be replaced.
        """
        async with self._turn:
            return await self._updated(manifest, verify, tolerance)

    async def _updated(self, manifest: WeightManifest, verify: bool, tolerance: float) -> float:
        self._check_whole()
        with self._updating():
            self._references = [bucket.handle for bucket in manifest.buckets]
            try:
                await self._staging(self._engine.stage(manifest.buckets, verify), f"version {manifest.version}")
                return await self._take(partial(self._engine.load, manifest.version), manifest, verify, tolerance)
            finally:
                self._references = []

    async def stage_ipc(
        self, number: int, bucket: Bucket, filled: list[DeviceBuffer], last: bool, verify: bool
    ) -> None:
        """Take a copy of a bucket from the learner rank on the same GPU; the engine stays as it is.

        Raises `PayloadError`, everything staged forgotten, and `EngineLostError`.
        """
        self._check_whole()
        info = staging_info(number, bucket, filled, last, verify)
        with self._updating():
            try:
                await self._staging(self._engine.stage_bucket(info), f"bucket {number}")
            except PayloadError:
                await self.drop_ipc()
                raise

    async def load_ipc(self, manifest: WeightManifest, verify: bool, tolerance: float) -> float:
        """Load and prove the version whose buckets have been staged; returns and raises as `update` does."""
        self._check_whole()
        with self._updating():
            return await self._take(partial(self._engine.load, manifest.version), manifest, verify, tolerance)

    async def drop_ipc(self) -> None:
        """Forget what is staged."""
        await self._staging(self._engine.discard(), "to forget a payload")

    async def _staging(self, call: Awaitable[None], what: str) -> None:
        """A call that does not touch the model: whatever it raises becomes a `PayloadError` or `EngineLostError`."""
        try:
            await call
        except EngineLostError as error:
            self._failure = str(error)
            raise EngineLostError(f"{self._name}: {self._failure}") from None
        except Exception as error:
            raise PayloadError(f"{self._name} refused {what}: {_root(error)}") from None

    async def open_nccl(self, group: NcclGroup, rank_offset: int) -> None:
        """Join a group that weights will come through, as ranks from `rank_offset` on; raises `EngineLostError`."""
        self._check_whole()
        try:
            await self._engine.open_nccl(group.engine_info(rank_offset))
        except Exception as error:
            self._failure = f"joining the NCCL group failed: {_root(error)}"
            raise EngineLostError(f"{self._name}: {self._failure}") from error

    async def receive(self, manifest: WeightManifest, verify: bool, tolerance: float) -> float:
        """Load and prove the version that the learner is broadcasting; returns as `update` does.

        Nothing is staged, so whatever goes wrong raises `EngineLostError`.
        """
        self._check_whole()
        with self._updating():
            receive = partial(self._engine.receive, manifest.version, update_info(manifest.buckets))
            return await self._take(receive, manifest, verify, tolerance)

    @contextmanager
    def _updating(self) -> Iterator[None]:
        self._updates += 1
        try:
            yield
        finally:
            self._updates -= 1
            self._settled.set()
            self._settled = asyncio.Event()

    async def _take(
        self, load: Callable[[], Awaitable[None]], manifest: WeightManifest, verify: bool, tolerance: float
    ) -> float:
        # The number may have been proved before, for other weights: a learner goes back to a checkpoint.
        self._proved.discard(manifest.version)
        try:
            # Of an engine that sleeps: the rest only once the old and the new weights are not both there any more.
            await self._engine.wake((WEIGHTS,))
            await load()
            await self._engine.wake()
            await self._engine.resume()
            errors = await self._probe(manifest.probes, manifest.version) if verify else []
            # Written so that a NaN fails too.
            wrong = [error for error in errors if not error.relative <= tolerance]
            if not wrong:
                await self._engine.serve()
        except Exception as error:
            self._failure = f"loading version {manifest.version} failed: {_root(error)}"
            raise EngineLostError(f"{self._name}: {self._failure}") from error
        if wrong:
            self._failure = (
                f"version {manifest.version} gives log-probs {wrong[0].absolute:.3g} off the learner's, relative "
                f"{wrong[0].relative:.3g} (sync.probe_tolerance allows {tolerance:.3g})"
            )
            raise EngineLostError(f"{self._name}: {self._failure}")
        self._version = manifest.version
        self._proved.add(manifest.version)
        return max((error.absolute for error in errors), default=float("nan"))

    async def sequence_logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """The engine's log-prob of each token after the first."""
        return await self._engine.sequence_logprobs(token_ids, f"logprobs-{id(token_ids)}")

    async def sleep(self, level: int) -> None:
        """Give the device's memory back until `wake` or the next update; see `actors.engine.sleeping`."""
        if level == DROP_WEIGHTS:
            self._version = None
        await self._engine.sleep(level)

    async def wake(self) -> None:
        """Take the device's memory again, if it was given back."""
        await self._engine.wake()

    def shutdown(self) -> None:
        """Stop the engine's own processes; nothing can be asked of it afterwards."""
        self._engine.shutdown()

    def version(self) -> int | None:
        """The proved version that is served; None before the first update and after a failure."""
        return None if self._failure else self._version

    def _check_whole(self) -> None:
        if self._failure:
            raise EngineLostError(f"{self._name}: {self._failure}")

    async def _probe(self, probes: tuple[Probe, ...], version: int) -> list[ProbeError]:
        found = await asyncio.gather(
            *(self._engine.sequence_logprobs(probe.token_ids, f"probe-{version}-{i}") for i, probe in enumerate(probes))
        )
        return [probe_error(got, probe.logprobs) for got, probe in zip(found, probes, strict=True)]


def _root(error: BaseException) -> str:
    """One line about the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]
