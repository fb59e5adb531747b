"""The ipc plane over in-process handles: the order of calls, and what a failure on either side does."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from actors.fleet import GeneratorFleet
from actors.weights.ipc import DeviceBuffer, IpcPlane
from actors.weights.transport import build_plane
from rlhf.config import RunConfig
from rlhf.errors import EngineLostError, LearnerLostError, PayloadError, RLHFError
from rlhf.health import State
from rlhf.records import Bucket, Probe, TensorSpec, WeightManifest

SHAPES: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (4,), "c": (5,)}


def manifest(version: int = 1, names: Sequence[str] = ("a", "b", "c")) -> WeightManifest:
    buckets = tuple(Bucket((TensorSpec(name, "float32", SHAPES[name], 0, 24, ""),), 64) for name in names)
    return WeightManifest(version, buckets, (Probe((1, 2), (-1.0,)),))


class Method:
    def __init__(self, function: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> "asyncio.Task[Any]":
        return asyncio.create_task(self._function(*arguments))


class Learner:
    """Two buffers, in which a bucket's number is what is in it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.version = 1
        self.slots = [-1, -1]
        self.dies_at: int | None = None

    async def begin_ipc(self, version: int) -> None:
        self.log.append("begin")
        if version != self.version:
            raise PayloadError(f"the learner holds version {self.version}")

    async def fill_ipc(self, number: int) -> list[DeviceBuffer]:
        self.log.append(f"fill {number}")
        if number == self.dies_at:
            raise LearnerLostError("rank 0 died")
        self.slots[number % 2] = number
        return [DeviceBuffer("gpu", number % 2, {}, number)]

    async def end_ipc(self) -> None:
        self.log.append("end")


class Engine:
    """In-process handle of a generator; `behaviour` says how its stagings and loads end, one after the other."""

    def __init__(self, name: str, learner: Learner, behaviour: Sequence[str] = ()) -> None:
        self.name, self.learner, self.behaviour = name, learner, list(behaviour)
        self.held: list[int] = []
        self.proved: int | None = None
        self.stage_ipc, self.load_ipc = Method(self._stage), Method(self._load)
        self.drop_ipc, self.version = Method(self._drop), Method(self._version)

    async def _act(self) -> None:
        match self.behaviour.pop(0) if self.behaviour else "good":
            case "refused":
                raise PayloadError(f"{self.name}: checksum")
            case "lost":
                raise EngineLostError(f"{self.name}: out of memory")
            case "died":
                raise RLHFError(f"{self.name}: the actor died")
            case "stuck":
                await asyncio.sleep(60)
            case "bug":
                raise KeyError("a mistake of ours")

    async def _stage(self, number: int, bucket: Bucket, filled: list[DeviceBuffer], last: bool, verify: bool) -> None:
        self.learner.log.append(f"{self.name} stage {number}{' last' if last else ''}")
        if number == 0:
            self.held = []
        await self._act()
        await asyncio.sleep(0.02)  # meanwhile the other buffer is filled
        assert self.learner.slots[filled[0].slot] == number == filled[0].checksum
        self.held.append(number)

    async def _load(self, manifest: WeightManifest, verify: bool, tolerance: float) -> float:
        self.learner.log.append(f"{self.name} load {manifest.version}")
        await self._act()
        assert self.held == list(range(len(manifest.buckets)))
        self.held, self.proved = [], manifest.version
        return 0.01

    async def _drop(self) -> None:
        self.held = []

    async def _version(self) -> int | None:
        return self.proved


class Setup:
    def __init__(self, *behaviours: Sequence[str], deadline: float = 2.0) -> None:
        self.learner = Learner()
        self.replaced: list[str] = []
        self.engines: dict[str, Engine] = {}
        for index, behaviour in enumerate(behaviours):
            self.engines[f"g{index}"] = Engine(f"g{index}", self.learner, behaviour)

        async def restart(name: str) -> Engine:
            self.replaced.append(name)
            self.engines[name] = Engine(name, self.learner)
            return self.engines[name]

        self.fleet = GeneratorFleet(dict(self.engines), {}, 4, restart)
        self.plane = IpcPlane(self.fleet, True, 0.1, deadline, self.learner, SHAPES)

    async def publish(self, version: int = 1, **options: Any) -> Any:
        return await self.plane.publish(manifest(version, **options), self.fleet.members())


async def test_buckets_are_filled_while_the_ones_before_are_copied_and_loaded_once_all_are_there() -> None:
    setup = Setup((), ())
    report = await setup.publish()
    log = setup.learner.log
    assert (report.served, report.failed, report.probe_error, report.nbytes) == (("g0", "g1"), {}, 0.01, 192)
    assert [line for line in log if not line.startswith("g1")] == [
        "begin",
        "fill 0",
        "fill 1",
        "g0 stage 0",
        "fill 2",
        "g0 stage 1",
        "g0 stage 2 last",
        "end",
        "g0 load 1",
    ]


async def test_an_incomplete_payload_is_refused_before_anything_is_called() -> None:
    setup = Setup(())
    with pytest.raises(PayloadError, match="1 tensors are missing, the first is c"):
        await setup.publish(names=("a", "b"))
    assert setup.learner.log == []


async def test_a_refused_bucket_is_no_loss_and_the_payload_is_sent_once_more() -> None:
    setup = Setup((), ("good", "refused"))
    report = await setup.publish()
    assert report.served == ("g0", "g1")
    assert setup.replaced == []
    log = setup.learner.log
    # The other one was not held up, and took part in nothing twice.
    assert log.count("g0 load 1") == log.count("g1 load 1") == 1
    assert log.count("begin") == log.count("end") == 2
    assert "g1 stage 2 last" not in log[: log.index("end")]


async def test_an_engine_that_refuses_twice_does_not_serve() -> None:
    setup = Setup((), ("refused", "refused"))
    report = await setup.publish()
    assert report.served == ("g0",)
    assert report.failed == {"g1": "g1: checksum"}


@pytest.mark.parametrize("how", ["lost", "died", "stuck"])
async def test_an_engine_that_is_lost_while_loading_is_started_again_and_gets_the_same_version(how: str) -> None:
    setup = Setup((), ("good", "good", "good", how), deadline=0.5)
    report = await setup.publish()
    for member in report.served:
        await setup.fleet.admit(member, 1)
    assert report.served == ("g0",)
    await setup.fleet.recovered()
    # The learner still holds the version: nobody waits for the next one.
    assert setup.replaced == ["g1"]
    assert setup.engines["g1"].proved == 1
    assert setup.fleet.state("g1") == State.HEALTHY


async def test_a_learner_that_went_on_sends_no_old_version(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup((), ())
    for member in (await setup.publish()).served:
        await setup.fleet.admit(member, 1)
    setup.learner.version = 2
    setup.fleet.lost("g1", "killed", setup.fleet.handle("g1"))
    await setup.fleet.recovered()
    assert setup.fleet.state("g1") == State.STALE
    assert setup.engines["g1"].proved is None


async def test_a_learner_that_dies_is_its_own_error_and_leaves_nothing_staged() -> None:
    setup = Setup((), ())
    setup.learner.dies_at = 2
    with pytest.raises(LearnerLostError, match="rank 0 died"):
        await setup.publish()
    assert setup.replaced == []
    assert [engine.held for engine in setup.engines.values()] == [[], []]


async def test_a_mistake_of_ours_is_not_taken_for_a_lost_engine() -> None:
    setup = Setup(("bug",))
    with pytest.raises(KeyError):
        await setup.publish()
    assert setup.replaced == []


def test_the_plane_of_the_transport() -> None:
    setup = Setup(())
    config = RunConfig(name="t", policy={"path": "m"}, prompts={"path": "p"}, cluster={"colocate": True})
    learner: Any = setup.learner
    plane = build_plane("ipc", config, setup.fleet, learner, SHAPES, 0.1, lambda message: None)
    assert isinstance(plane, IpcPlane)
    # One that is started again later gets the version too.
    assert setup.fleet.catch_up == plane.catch_up
