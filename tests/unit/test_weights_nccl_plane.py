"""The nccl plane over in-process handles: the order of calls, and what a failure on either side does."""

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any

import pytest

from actors.fleet import GeneratorFleet
from actors.weights.nccl import NcclGroup, NcclPlane
from actors.weights.transport import build_plane
from rlhf.config import RunConfig
from rlhf.errors import EngineLostError, LearnerLostError, PayloadError, RLHFError
from rlhf.health import State
from rlhf.records import Bucket, Probe, TensorSpec, WeightManifest

SHAPES: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (4,)}


def manifest(version: int = 1, names: Sequence[str] = ("a", "b"), dtypes: Sequence[str] = ()) -> WeightManifest:
    kinds = list(dtypes) or ["bfloat16"] * len(names)
    specs = [TensorSpec(name, kind, SHAPES[name], 0, 12, "") for name, kind in zip(names, kinds, strict=True)]
    return WeightManifest(version, (Bucket(tuple(specs), 24),), (Probe((1, 2), (-1.0,)),))


class Call:
    """A call under way. As with a reference of Ray, to stop waiting for it does not stop it."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self.task = asyncio.create_task(work)

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(self.task).__await__()


class Method:
    def __init__(self, function: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> Call:
        return Call(self._function(*arguments))


class Broadcast:
    """The group in this process: an update waits for the sender, the sender for every engine that is in the group."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.groups: list[NcclGroup] = []
        self.offsets: dict[str, int] = {}
        self.sending = asyncio.Event()
        self.generation = 0

    # The learner's side, as `LearnerGroup` has it. It watches the calls, as a rank does.
    async def rendezvous(self) -> tuple[str, int]:
        self.log.append("rendezvous")
        return "10.0.0.1", 29500 + len(self.groups)

    async def open_nccl(self, group: NcclGroup, calls: Sequence[Any]) -> None:
        self.log.append("learner open")
        self.groups.append(group)
        await self._watch(calls, 0.5)

    async def send_nccl(self, calls: Sequence[Any]) -> None:
        self.log.append("learner send")
        self.sending.set()
        await asyncio.sleep(0.01)
        await self._watch([call for call in calls if call.task.done()], 0.5)
        self.sending.clear()

    async def _watch(self, calls: Sequence[Any], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*calls)
        except (Exception, TimeoutError) as error:
            raise EngineLostError(f"NCCL group: {error or 'not done'}") from None


class Engine:
    """In-process handle of a generator; `behaviour` says how its updates end, one after the other."""

    def __init__(self, name: str, network: Broadcast, behaviour: Sequence[str] = ()) -> None:
        self.name, self.network, self.behaviour = name, network, list(behaviour)
        self.open_nccl = Method(self._open)
        self.receive = Method(self._receive)

    async def _open(self, group: NcclGroup, rank_offset: int) -> None:
        self.network.log.append(f"{self.name} open")
        self.network.offsets[self.name] = rank_offset
        if self.behaviour[:1] == ["deaf"]:
            await asyncio.sleep(60)

    async def _receive(self, manifest: WeightManifest, verify: bool, tolerance: float) -> float:
        self.network.log.append(f"{self.name} receive {manifest.version}")
        match self.behaviour.pop(0) if self.behaviour else "good":
            case "broken":
                raise EngineLostError(f"{self.name}: out of memory")
            case "stuck":
                await asyncio.sleep(60)
            case "died":
                raise RLHFError(f"{self.name}: the actor died")
            case "bug":
                raise KeyError("a mistake of ours")
        await self.network.sending.wait()
        await asyncio.sleep(0.05)
        return 0.01


class Setup:
    def __init__(self, *behaviours: Sequence[str], deadline: float = 1.0, replacements: Sequence[str] = ()) -> None:
        self.network = Broadcast()
        self.replaced: list[str] = []
        names = [f"g{index}" for index in range(len(behaviours))]

        async def restart(name: str) -> Engine:
            self.replaced.append(name)
            self.network.log.append(f"replace {name}")
            first = self.replaced == [name]
            return Engine(name, self.network, replacements if first else ())

        handles = {name: Engine(name, self.network, how) for name, how in zip(names, behaviours, strict=True)}
        self.fleet = GeneratorFleet(handles, {}, 4, restart)
        self.plane = NcclPlane(self.fleet, True, 0.1, deadline, self.network, SHAPES, workers=2, buffer_bytes=1 << 20)

    async def publish(self, version: int = 1, **options: Any) -> Any:
        return await self.plane.publish(manifest(version, **options), self.fleet.members())


async def test_the_group_is_opened_once_and_both_ends_run_together() -> None:
    setup = Setup((), ())
    first, second = await setup.publish(1), await setup.publish(2)
    assert setup.network.log[0] == "rendezvous"
    assert sorted(setup.network.log[1:4]) == ["g0 open", "g1 open", "learner open"]
    assert sorted(setup.network.log[4:7]) == ["g0 receive 1", "g1 receive 1", "learner send"]
    assert sorted(setup.network.log[7:]) == ["g0 receive 2", "g1 receive 2", "learner send"]
    # Rank 0 is the learner; two engines of two workers each follow it.
    assert setup.network.groups == [NcclGroup("10.0.0.1", 29500, 5, True, 1 << 20)]
    assert setup.network.offsets == {"g0": 1, "g1": 3}
    assert (first.served, first.failed, first.probe_error, first.nbytes) == (("g0", "g1"), {}, 0.01, 24)
    assert second.version == 2


async def test_tensors_of_several_dtypes_are_sent_one_by_one() -> None:
    setup = Setup(())
    await setup.publish(dtypes=("bfloat16", "float32"))
    assert [group.packed for group in setup.network.groups] == [False]


async def test_an_incomplete_payload_is_refused_before_anything_is_called() -> None:
    setup = Setup((), ())
    with pytest.raises(PayloadError, match="1 tensors are missing, the first is b"):
        await setup.publish(names=("a",))
    assert setup.network.log == []
    assert setup.replaced == []


@pytest.mark.parametrize("how", ["broken", "died"])
async def test_an_engine_that_fails_takes_the_whole_group_with_it(how: str) -> None:
    setup = Setup((), (how,))
    report = await setup.publish()
    # g0 waited for the rest of a payload that never came: it is lost as well.
    assert sorted(setup.replaced) == ["g0", "g1"]
    assert report.served == ("g0", "g1")
    assert [group.port for group in setup.network.groups] == [29500, 29501]


async def test_an_engine_that_takes_no_part_is_lost_at_the_deadline_and_a_proved_one_serves() -> None:
    setup = Setup((), ("stuck",), deadline=0.3)
    report = await setup.publish()
    assert setup.replaced == ["g1"]
    assert report.served == ("g0", "g1")
    # The second attempt is for the new engine alone; the next version needs a group of both again.
    assert [group.world_size for group in setup.network.groups] == [5, 3]
    await setup.publish(2)
    assert [group.world_size for group in setup.network.groups] == [5, 3, 5]
    assert setup.network.offsets == {"g0": 1, "g1": 3}


async def test_an_engine_that_does_not_join_is_replaced_and_nothing_is_sent_before() -> None:
    setup = Setup((), ("deaf",), deadline=0.3)
    report = await setup.publish()
    assert setup.replaced == ["g1"]
    assert report.served == ("g0", "g1")
    assert setup.network.log.index("replace g1") < setup.network.log.index("learner send")
    assert [group.world_size for group in setup.network.groups] == [5, 5]


async def test_an_engine_lost_twice_is_reported_and_started_again_for_the_next_version() -> None:
    setup = Setup((), ("stuck",), deadline=0.3, replacements=("stuck",))
    report = await setup.publish()
    assert report.served == ("g0",)
    assert list(report.failed) == ["g1"]
    assert "g1: update to version 1 did not end within 0 s" in report.failed["g1"]
    await setup.fleet.recovered()
    assert setup.replaced == ["g1", "g1"]
    # It has no version until there is a next one.
    assert setup.fleet.state("g1") == State.STALE
    assert (await setup.publish(2)).served == ("g0", "g1")


async def test_a_version_waits_for_an_engine_if_all_are_being_started_again() -> None:
    setup = Setup((), ())
    for name in ("g0", "g1"):
        setup.fleet.lost(name, "killed", setup.fleet.handle(name))
    assert setup.fleet.running() == []
    assert (await setup.publish(1)).served == ("g0", "g1")
    assert setup.replaced == ["g0", "g1"]


async def test_an_engine_that_is_being_started_again_is_left_out() -> None:
    setup = Setup((), ())
    await setup.publish(1)
    setup.fleet.lost("g1", "killed", setup.fleet.handle("g1"))
    report = await setup.publish(2)
    assert (report.served, report.failed) == (("g0",), {})
    await setup.fleet.recovered()
    assert (await setup.publish(3)).served == ("g0", "g1")


async def test_no_engine_left_is_an_error_that_says_why() -> None:
    setup = Setup(("broken",), replacements=("broken",))
    with pytest.raises(RLHFError, match=r"no generator took version 1: .*out of memory"):
        await setup.publish()


async def test_a_learner_that_is_started_again_meets_the_engines_in_a_new_group() -> None:
    setup = Setup((), ())
    await setup.publish(2)
    setup.network.generation += 1
    assert (await setup.publish(1)).served == ("g0", "g1")
    assert [group.port for group in setup.network.groups] == [29500, 29501]
    await setup.publish(2)
    assert len(setup.network.groups) == 2
    assert setup.replaced == []


@pytest.mark.parametrize("method", ["open_nccl", "send_nccl"])
async def test_a_learner_lost_on_the_way_costs_the_engines_that_wait_for_it(method: str) -> None:
    setup = Setup((), ("stuck",) if method == "send_nccl" else ())
    whole = getattr(setup.network, method)

    async def lost(*arguments: Any) -> None:
        if method == "send_nccl":
            # One engine has all of it by then.
            await whole(*arguments)
            await asyncio.sleep(0.1)
        raise LearnerLostError("learner: rank 0 died")

    setattr(setup.network, method, lost)
    with pytest.raises(LearnerLostError, match="rank 0 died"):
        await setup.publish(1)
    await setup.fleet.recovered()
    assert sorted(setup.replaced) == (["g1"] if method == "send_nccl" else ["g0", "g1"])
    setattr(setup.network, method, whole)
    setup.network.generation += 1
    assert (await setup.publish(0)).served == ("g0", "g1")


async def test_a_group_in_which_the_learner_died_is_not_taken_for_one_that_is_open() -> None:
    setup = Setup((), ())
    await setup.publish(1)
    # Only g0 is asked, so a group of its own is due, in whose making the learner dies.
    whole = setup.network.rendezvous

    async def lost() -> Any:
        raise LearnerLostError("learner: rank 0 died")

    setup.network.rendezvous = lost  # type: ignore[method-assign]
    with pytest.raises(LearnerLostError):
        await setup.plane.publish(manifest(2), ["g0"])
    setup.network.rendezvous = whole  # type: ignore[method-assign]
    await setup.publish(2)
    assert len(setup.network.groups) == 2


def test_the_plane_of_each_transport() -> None:
    fleet = Setup(()).fleet
    config = RunConfig(name="t", policy={"path": "models/x"}, prompts={"path": "p.jsonl"})
    names = {
        transport: type(build_plane(transport, config, fleet, Broadcast(), SHAPES, 0.1, print)).__name__
        for transport in ("object_store", "nccl")
    }
    assert names == {"object_store": "ObjectStorePlane", "nccl": "NcclPlane"}
