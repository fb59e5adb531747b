"""The learner group: DeepSpeed ranks in Ray actors behind the `Learner` port."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.engine.ipc import IpcSender
from actors.engine.plugin import IPC, NCCL
from actors.ranks import Ranks
from actors.reviving import revive
from actors.weights.ipc import DeviceBuffer
from actors.weights.nccl import NcclGroup
from actors.weights.outgoing import Outgoing, Publishing
from rlhf.config.system import Deadlines
from rlhf.errors import PayloadError, RLHFError
from rlhf.health import Health, ProgressBudget, RestartBudget
from rlhf.learning.engine import hold_port
from rlhf.learning.job import LearnerJob
from rlhf.learning.rank import RankLearner
from rlhf.records import Pair, Probe, SealedRound, StepReport, WeightManifest

GRACE_S = 30.0
"""What the driver waits beyond a rank's own deadline for it to break off an NCCL transfer."""


class LearnerActor:
    """One DeepSpeed rank. Calls run one after the other, in the order in which they were made."""

    def __init__(
        self,
        config: LearnerJob,
        rank: int,
        world_size: int,
        device: str,
        publishing: Publishing,
    ):
        self._rank = rank
        self._adapters = publishing.adapters
        self._device = device
        self._transport = publishing.transport
        self._sender: Any = None
        self._learner = RankLearner(config, rank, world_size, device)
        export = self._learner.export_tensors
        self._ipc = IpcSender(export, device, publishing.bucket_bytes) if self._transport == IPC else None
        self._outgoing = Outgoing(publishing)

    def meeting_point(self) -> tuple[str, int]:
        """An address on this node where the ranks can meet. The port is served from now on, so nobody else takes it."""
        address = ray.util.get_node_ip_address()
        # torch's rendezvous in this process, by the same address, is served by the same server.
        self._meeting = hold_port(address)
        return address, self._meeting.port

    def rendezvous(self) -> tuple[str, int]:
        """An address and a free port on this node, for an NCCL group to meet at."""
        import socket

        with socket.socket() as server:
            server.bind(("", 0))
            return ray.util.get_node_ip_address(), server.getsockname()[1]

    def start(self, address: str, port: int, deadline: float) -> list[str]:
        """Join the process group and load the model; returns what a user should know of it."""
        with naming_memory():
            self._learner.start(address, port, deadline)
        if self._transport == NCCL:
            # Loads vLLM, which a learner does without otherwise.
            from actors.engine.nccl import NcclSender

            self._sender = NcclSender(self._learner.export_tensors, self._rank, self._device)
        return self._learner.notes

    def train(self, sealed: SealedRound, others: Mapping[str, SealedRound]) -> Iterator[StepReport]:
        """Yield a report after each optimizer step; reports are the same on every rank, only rank 0 sends them."""
        with naming_memory():
            for report in self._learner.steps(sealed, others):
                if self._rank == 0:
                    yield report

    def statistics(self) -> dict[str, float]:
        """Round metrics of the last `train`."""
        return self._learner.statistics()

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Summed log-probs of `pairs`, float64 [n, 2]."""
        with naming_memory():
            return self._learner.score(pairs).double().numpy()

    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Loss and rewards of `pairs`, equal on every rank."""
        with naming_memory():
            return self._learner.evaluate(pairs)

    def save(self, path: Path) -> None:
        """Write this rank's part of a checkpoint."""
        self._learner.save(path)

    def load(self, path: Path) -> None:
        """Restore this rank's part of a checkpoint."""
        self._learner.load(path)

    def export(self, path: Path) -> None:
        """Write the policy as a Hugging Face checkpoint (rank 0; all ranks gather)."""
        self._learner.export_hf(path)

    def sleep(self) -> None:
        """Give the GPU's memory back; on a CPU only the calls before have to end."""
        self._learner.sleep()

    def wake(self) -> None:
        """Take the GPU's memory again."""
        with naming_memory():
            self._learner.wake()

    def manifest(self, version: int, probes: Sequence[Sequence[int]]) -> WeightManifest | None:
        """Pack the weights into the object store (rank 0; all ranks gather) and take the probes' log-probs.

        This actor owns the buffers: they live as long as somebody holds the manifest. With NCCL and IPC there are none:
        the manifest only lists the tensors.
        """
        with naming_memory():
            logprobs = self._learner.probe(probes)
        proofs = tuple(Probe(ids, found) for ids, found in zip(probes, logprobs, strict=True))
        if self._sender:
            table = self._sender.table()
            return WeightManifest(version, (table,), proofs) if self._rank == 0 else None
        if self._ipc:
            return WeightManifest(version, self._ipc.layout(), proofs)
        tensors = self._learner.export_adapters() if self._adapters else self._learner.export_tensors()
        if self._rank:
            for _ in tensors:
                pass
            return None
        return self._outgoing.manifest(version, tensors, proofs)

    def open_nccl(self, group: NcclGroup, calls: Sequence[ray.ObjectRef], deadline: float) -> None:
        """Meet the engines that `calls` let join; see `actors.engine.nccl`."""
        self._sender.open(group, calls if self._rank == 0 else (), deadline)

    def send_nccl(self, calls: Sequence[ray.ObjectRef], deadline: float) -> None:
        """Broadcast the weights to the engines that `calls` let receive them (rank 0; all ranks gather)."""
        self._sender.send(calls, deadline)

    def begin_ipc(self, version: int) -> None:
        """Get the buffers for a sending; raises `PayloadError` if the weights are not those of `version` any more."""
        assert self._ipc is not None
        if self._learner.rounds_done != version:
            raise PayloadError(
                f"version {version} cannot be sent again: the learner holds version {self._learner.rounds_done}"
            )
        self._ipc.begin()

    def fill_ipc(self, number: int) -> DeviceBuffer:
        """Put bucket `number`, the next one, into this rank's buffer; all ranks gather."""
        assert self._ipc is not None
        return self._ipc.fill(number)

    def end_ipc(self) -> None:
        """Give the buffers back."""
        assert self._ipc is not None
        self._ipc.end()


class LearnerGroup:
    """The `Learner` port over the rank actors; every call goes to all ranks."""

    def __init__(
        self,
        handles: Sequence[Any],
        deadlines: Deadlines,
        probes: Sequence[Sequence[int]],
        launch: Callable[[], Awaitable[Sequence[Any]]] | None = None,
        budget: RestartBudget | None = None,
        alert: Callable[[str], None] = lambda message: None,
        share: Callable[[Any], Any] = ray.put,
    ):
        """`launch` makes new rank actors in place of all old ones; each restart takes from `budget`, which others
        share, and is told to `alert`.

        `share` gives what stands for a value in calls of several ranks, which would pickle it for each of them.
        """
        self._ranks = Ranks(handles)
        self._deadlines = deadlines
        self._probes = list(probes)
        self._launch = launch
        self._budget = ProgressBudget(budget or RestartBudget(5, 3600.0))
        self._health = Health(self._budget, deadlines.learn)
        self._alert = alert
        self._share = share
        self.generation = 0
        """How often the ranks were started again: each time they have joined no NCCL group."""

    async def start(self) -> list[str]:
        """Let the ranks meet and load their shards; returns rank 0's notes for the user."""
        limit = self._deadlines.start
        address, port = await self._first("meeting_point", limit, "start")
        return (await self._ranks.all("start", limit, "start", address, port, limit))[0]

    async def restart(self) -> bool:
        """Start all ranks again if one of them is lost; see the port."""
        if not await self._ranks.look():
            return False
        launch = self._launch
        if launch is None:
            raise RLHFError(f"learner: {self._ranks.loss}")

        async def again() -> Ranks:
            self._ranks = Ranks(await launch())
            self.generation += 1
            await self.start()
            return self._ranks

        self._health.died(self._ranks.loss)
        if await revive("learner", self._health, self._budget, again, self._alert) is None:
            raise RLHFError(f"learner: {self._health.reason}; the same command goes on from the last checkpoint")
        return True

    async def rendezvous(self) -> tuple[str, int]:
        """An address and a free port on rank 0's node, for an NCCL group."""
        return await self._first("rendezvous", self._deadlines.start, "start")

    async def open_nccl(self, group: NcclGroup, calls: Sequence[ray.ObjectRef]) -> None:
        """Join a group with the engines; see `actors.weights.nccl.Sender`."""
        limit = self._deadlines.sync
        await self._ranks.all("open_nccl", limit + GRACE_S, "joining the NCCL group", group, list(calls), limit)

    async def send_nccl(self, calls: Sequence[ray.ObjectRef]) -> None:
        """Broadcast the weights to the group; see `actors.weights.nccl.Sender`."""
        limit = self._deadlines.sync
        await self._ranks.all("send_nccl", limit + GRACE_S, "sending over NCCL", list(calls), limit)

    async def begin_ipc(self, version: int) -> None:
        """Get the buffers; see `actors.weights.ipc.Sender`."""
        await self._ranks.all("begin_ipc", self._deadlines.sync, f"version {version}", version)

    async def fill_ipc(self, number: int) -> list[DeviceBuffer]:
        """Fill the next bucket; see `actors.weights.ipc.Sender`."""
        return await self._ranks.all("fill_ipc", self._deadlines.sync, f"bucket {number}", number)

    async def end_ipc(self) -> None:
        """Give the buffers back."""
        await self._ranks.all("end_ipc", self._deadlines.sync, "giving buffers back")

    async def train(self, sealed: SealedRound, others: Mapping[str, SealedRound]) -> AsyncIterator[StepReport]:
        """Yield the round's step reports as they are made."""
        self._ranks.check()
        arguments = self._shared(sealed), self._shared(dict(others)) if others else {}
        methods = [handle.train.options(num_returns="streaming") for handle in self._ranks.handles]
        reports: asyncio.Queue[StepReport | None] = asyncio.Queue()
        calls = [_follow(method.remote(*arguments), reports) for method in methods]
        training = asyncio.create_task(self._ranks.together(calls, self._deadlines.learn, f"round {sealed.round}"))
        training.add_done_callback(lambda _: reports.put_nowait(None))
        try:
            while (report := await reports.get()) is not None:
                yield report
            await training
        finally:
            training.cancel()

    async def statistics(self) -> dict[str, float]:
        """Round metrics of the last `train`."""
        return await self._first("statistics", self._deadlines.learn, "statistics")

    async def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Summed log-probs of `pairs` under the policy: float64 [n, 2]."""
        what = f"scoring {len(pairs)} pairs"
        return (await self._ranks.all("score", self._deadlines.learn, what, self._shared(tuple(pairs))))[0]

    async def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Mean loss and rewards of `pairs` under the policy, without a step."""
        what = f"evaluating {len(pairs)} pairs"
        return (await self._ranks.all("evaluate", self._deadlines.learn, what, self._shared(tuple(pairs))))[0]

    async def save(self, path: Path) -> None:
        """Write a checkpoint into `path`."""
        await self._ranks.all("save", self._deadlines.checkpoint, f"save {path.name}", path)
        self._budget.progressed()

    async def load(self, path: Path) -> None:
        """Restore a checkpoint."""
        await self._ranks.all("load", self._deadlines.checkpoint, f"load {path.name}", path)

    async def export(self, path: Path) -> None:
        """Write the policy as a Hugging Face checkpoint."""
        await self._ranks.all("export", self._deadlines.checkpoint, "export", path)

    async def manifest(self, version: int) -> WeightManifest:
        """Export the weights of `version`, packed and checksummed, with the probes' log-probs."""
        what = f"export version {version}"
        return (await self._ranks.all("manifest", self._deadlines.sync, what, version, self._probes))[0]

    async def sleep(self) -> None:
        """Give the GPUs' memory back, once a save that is under way has ended."""
        await self._ranks.all("sleep", self._deadlines.checkpoint, "going to sleep")

    async def wake(self) -> None:
        """Take the GPUs' memory again, once a save that is under way has ended."""
        await self._ranks.all("wake", self._deadlines.checkpoint, "waking")

    def _shared(self, value: Any) -> Any:
        return self._share(value) if len(self._ranks.handles) > 1 else value

    async def _first(self, method: str, deadline: float, what: str) -> Any:
        self._ranks.check()
        call = getattr(self._ranks.handles[0], method).remote()
        return (await self._ranks.together([call], deadline, what))[0]


@contextmanager
def naming_memory() -> Iterator[None]:
    """A GPU that is out of memory becomes one line that says what to lower."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise RLHFError(
            f"learner: out of GPU memory ({reason}); lower learner.micro_batch_size or learner.max_length, set "
            "learner.activation_checkpointing or learner.offload.optimizer true, or shard over more ranks with "
            "learner.zero_stage 3"
        ) from error


async def _follow(stream: Any, reports: "asyncio.Queue[StepReport | None]") -> None:
    """Read a rank's stream to its end; only rank 0's has reports."""
    async for reference in stream:
        reports.put_nowait(await reference)
