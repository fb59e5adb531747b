"""Generators that die in all moments of an update, while they sample too: nothing waits for ever, nobody pays twice."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors.relay import RelayLostError
from actors.weights import plane as plane_module
from actors.weights.plane import ObjectStorePlane
from rlhf.errors import EngineLostError, PayloadError
from rlhf.health import State
from rlhf.records import SampleRequest, WeightManifest
from rlhf.rounds.controller import publish
from tests.unit.fleet_world import Generator, Remote, World, requests, wanted


class Engine(Generator):
    """Takes an update in `seconds`, or ends it with `error`; `killed` ends streams and updates alike."""

    def __init__(self, name: str, seconds: float = 0.0, error: Exception | None = None, delay: float = 0.0) -> None:
        super().__init__(name, delay)
        self.seconds, self.error, self.proved = seconds, error, None
        self.killed = asyncio.Event()
        self.updates = 0
        self.update, self.version = Remote(self._update), Remote(self._served)

    async def _served(self) -> int | None:
        return self.proved

    async def _update(self, manifest: WeightManifest, verify: bool, tolerance: float) -> float:
        self.updates += 1
        try:
            async with asyncio.timeout(self.seconds):
                await self.killed.wait()
            self.dead = True
            raise ray.exceptions.ActorDiedError()
        except TimeoutError:
            pass
        if self.error:
            raise self.error
        self.proved = manifest.version
        return 0.0

    def kill(self) -> None:
        self.dead = True
        self.killed.set()


def publishing(world: World, alerts: list[str] | None = None, deadline: float = 5.0) -> Callable[[int], Any]:
    plane = ObjectStorePlane(world.fleet, True, 0.1, deadline)

    async def manifest(version: int) -> WeightManifest:
        return WeightManifest(version, (), ())

    parts = {
        "fleet": world.fleet,
        "plane": plane,
        "learner": SimpleNamespace(manifest=manifest),
        "monitor": SimpleNamespace(alert=(alerts if alerts is not None else []).append),
    }
    system: Any = SimpleNamespace(**parts)
    return lambda version: asyncio.wait_for(publish(system, version), 20)


async def healthy(world: World, *names: str) -> None:
    async with asyncio.timeout(20):
        while any(world.fleet.state(name) != State.HEALTHY for name in names):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2])
async def test_all_killed_in_their_update_while_they_sample(count: int) -> None:
    """Streams tell of the deaths first, so all are being started again when the update finds out."""
    engines = [Engine("a", delay=0.02), Engine("b", delay=0.02)][:count]
    world = World(*engines, spares=[Engine("a"), Engine("b")][:count])
    publish = publishing(world)
    await publish(0)
    sampling = asyncio.create_task(world.sample(given := requests(8)))
    await asyncio.sleep(0.05)
    for engine in engines:
        engine.seconds = 10.0
    updating = asyncio.create_task(publish(1))
    await asyncio.sleep(0.05)
    for engine in engines:
        engine.kill()
    report = await updating
    assert set(report.served) <= {engine.name for engine in engines}
    assert report.served
    assert await sampling == wanted(given)
    await healthy(world, *(engine.name for engine in engines))
    assert all(world.generators[engine.name].proved == 1 for engine in engines)
    assert world.fleet.metrics()["fleet/restarts"] == count


@pytest.mark.parametrize("slow_start", [False, True])
async def test_one_that_dies_after_its_own_update_while_another_still_loads(slow_start: bool) -> None:
    world = World(Engine("a"), Engine("b", seconds=0.3), spares=[Engine("a")])
    world.gate = asyncio.Event() if slow_start else None
    updating = asyncio.create_task(publishing(world)(1))
    await asyncio.sleep(0.1)
    world.fleet.lost("a", "died while sampling", world.fleet.handle("a"))
    report = await updating
    assert report.served == ("b",)
    assert "died once it had proved version 1" in report.failed["a"]
    if world.gate:
        world.gate.set()
    await healthy(world, "a", "b")
    assert world.generators["a"].updates == 1
    assert world.fleet.metrics()["fleet/restarts"] == 1


async def test_one_that_refuses_a_payload_and_dies_before_it_can_be_sent_again() -> None:
    world = World(Engine("a", error=PayloadError("bad checksum")), Engine("b", seconds=0.3), spares=[Engine("a")])
    updating = asyncio.create_task(publishing(world)(1))
    await asyncio.sleep(0.1)
    world.fleet.lost("a", "died while sampling", world.fleet.handle("a"))
    # It is sent again to the process that is there by then.
    assert (await updating).served == ("a", "b")
    await healthy(world, "a", "b")
    assert world.generators["a"].updates == 1
    assert world.fleet.metrics()["fleet/restarts"] == 1


async def test_a_new_process_does_not_pay_for_the_update_of_the_one_before() -> None:
    """`a` is lost by sampling and up again while its old update still fails."""
    first = Engine("a", seconds=0.3, error=EngineLostError("a: loading failed"))
    world = World(first, Engine("b", seconds=0.6), spares=[fresh := Engine("a")])
    updating = asyncio.create_task(publishing(world)(1))
    await asyncio.sleep(0.1)
    world.fleet.lost("a", "died while sampling", world.fleet.handle("a"))
    await asyncio.sleep(0.1)
    assert world.fleet.state("a") == State.STALE
    assert (await updating).served == ("b",)
    await healthy(world, "a", "b")
    assert world.fleet.handle("a") is fresh
    assert (first.updates, fresh.updates) == (1, 1)
    assert world.fleet.metrics()["fleet/restarts"] == 1


async def test_one_that_dies_again_while_it_waits_for_its_version_is_started_again_at_once() -> None:
    world = World(Engine("a", delay=0.02), spares=[second := Engine("a", seconds=10.0), Engine("a")])
    publish = publishing(world)
    await publish(0)
    sampling = asyncio.create_task(world.sample(given := requests(8)))
    await asyncio.sleep(0.05)
    world.fleet.lost("a", "died while sampling", world.fleet.handle("a"))
    await asyncio.sleep(0.1)
    assert second.updates == 1
    world.fleet.lost("a", "was preempted", world.fleet.handle("a"))
    await healthy(world, "a")
    assert await sampling == wanted(given)
    assert (await publish(1)).served == ("a",)
    assert world.fleet.metrics()["fleet/restarts"] == 2
    assert not world.fleet._recoveries


async def test_a_member_that_comes_back_takes_a_version_once() -> None:
    """What an update has brought already is not sent again by whoever catches up."""
    world = World(Engine("a", error=EngineLostError("a: off the learner's")), spares=[fresh := Engine("a")])
    report = await publishing(world)(3)
    assert report.served == ("a",)
    await world.fleet.recovered()
    assert (fresh.updates, fresh.proved, world.fleet.state("a")) == (1, 3, State.HEALTHY)


class Flaky(Engine):
    """Behind a relay that is lost in the first call of every kind."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.lost: set[str] = set()
        self.sample, self.update = Remote(self._some), Remote(self._second_time)
        self.version, self.progress = Remote(self._version_second_time), Remote(self._never)

    def _lose(self, call: str) -> None:
        if call not in self.lost:
            self.lost.add(call)
            raise RelayLostError("relay-0: died")

    async def _second_time(self, manifest: WeightManifest, verify: bool, tolerance: float) -> float:
        self._lose("update")
        return await self._update(manifest, verify, tolerance)

    async def _version_second_time(self) -> int | None:
        self._lose("version")
        return self.proved

    async def _never(self) -> int:
        raise RelayLostError("relay-0: died")

    async def _some(self, chunk: list[SampleRequest], sampling: dict[str, Any]) -> AsyncIterator[Awaitable[Any]]:
        given = 0
        async for item in self._sample(chunk, sampling):
            yield item
            given += 1
            if given == 3:
                self._lose("sample")


async def test_a_lost_relay_is_nobodys_death() -> None:
    flaky = Flaky("a")
    world, alerts = World(flaky), []
    report = await publishing(world, alerts)(1)
    assert (report.served, report.failed, alerts) == (("a",), {}, [])
    assert await world.sample(given := requests(8)) == wanted(given)
    # What had come before the relay was lost was not asked for again.
    assert sorted(flaky.given) == sorted(wanted(given).values())
    assert flaky.lost == {"sample", "update"}
    await world.fleet._ask(world.fleet._members["a"])
    await world.fleet.suspend("a")
    await world.fleet.admit("a", 1)
    assert world.fleet.state("a") == State.STALE
    await world.fleet.admit("a", 1)
    assert world.fleet.state("a") == State.HEALTHY
    assert world.fleet.metrics()["fleet/restarts"] == 0


@pytest.mark.parametrize(("relays", "served"), [(6, ("a", "b")), (10**6, ("b",))])
async def test_relays_that_are_lost_one_after_the_other_cost_an_update_at_most_its_deadline(
    relays: int, served: tuple[str, ...], monkeypatch
) -> None:
    """As on a node that is going: each relay that is started there dies with what it was asked first."""
    monkeypatch.setattr(plane_module, "RELAY_PAUSE_S", 0.01)
    engines, alerts = [Engine("a"), Engine("b")], []
    world, left = World(*engines), relays

    async def update(*arguments: Any) -> float:
        nonlocal left
        left -= 1
        if left >= 0:
            raise RelayLostError("relay-0: never ran")
        return await engines[0]._update(*arguments)

    engines[0].update = Remote(update)
    report = await publishing(world, alerts, deadline=1.5)(1)
    assert report.served == served
    assert set(report.failed) == {"a", "b"} - set(served)
    assert [alert for alert in alerts if "a does not serve" not in alert] == []
    assert world.fleet.metrics()["fleet/restarts"] == 0
    assert world.fleet.handle("a") is engines[0]


async def test_a_lost_relays_update_is_sent_again_while_another_engine_hangs() -> None:
    hangs, flaky, quick = Engine("a", seconds=60.0), Flaky("b"), Engine("c")
    world, alerts = World(hangs, flaky, quick, spares=[Engine("a")]), []
    task = asyncio.create_task(publishing(world, alerts, deadline=1.2)(1))
    async with asyncio.timeout(0.9):
        while flaky.proved != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not task.done(), "one is still waited for"
    report = await task
    assert report.served == ("b", "c")
    assert "a: update to version 1 did not end within 1 s" in report.failed["a"]
    await healthy(world, "a", "b", "c")
