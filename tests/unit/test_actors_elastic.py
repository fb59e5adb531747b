"""Generators that join and leave the fleet, over in-process ones."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import pytest

import actors.elastic as elastic_module
from actors.elastic import Elastic
from rlhf.config.generator import Replicas
from rlhf.errors import DeadlineError, RLHFError
from rlhf.health import State
from tests.unit.fleet_world import Generator, World, requests, wanted

pytestmark = pytest.mark.timeout(60)


async def until(what: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not what():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)


async def test_a_new_member_joins_the_round_that_runs_once_it_has_proved_the_version() -> None:
    world = await World(Generator("g0", delay=0.005)).admitted()
    task = asyncio.create_task(world.sample(given := requests(60)))
    await asyncio.sleep(0.05)
    world.fleet.add("g1", joined := Generator("g1", delay=0.005))
    assert world.fleet.state("g1") == State.STALE
    assert await task == wanted(given)
    assert world.fleet.state("g1") == State.HEALTHY
    assert joined.given, "the new one took part"
    assert world.fleet.metrics() == {"fleet/members": 2.0, "fleet/restarts": 0.0}


async def test_a_drained_member_ends_what_it_samples_and_gets_nothing_new() -> None:
    leaving, other = Generator("g0", delay=0.005), Generator("g1", delay=0.005)
    world = await World(leaving, other).admitted()
    task = asyncio.create_task(world.sample(given := requests(80)))
    await until(lambda: leaving.given)
    await world.fleet.drain("g0", "its node is drained", 30.0)
    assert not task.done()
    count = len(leaving.given)
    assert await task == wanted(given)
    assert len(leaving.given) == count
    # Nothing was sampled twice: it had the time to end its own.
    assert max(Counter(leaving.given + other.given).values()) == 1
    assert world.fleet.members() == ["g1"]
    assert world.fleet.metrics() == {"fleet/members": 1.0, "fleet/restarts": 0.0}


async def test_what_a_drained_member_cannot_end_in_time_goes_to_others() -> None:
    leaving, other = Generator("g0", wedged=True), Generator("g1")
    world = await World(leaving, other).admitted()
    task = asyncio.create_task(world.sample(given := requests(30)))
    await asyncio.sleep(0.05)
    before = time.monotonic()
    await world.fleet.drain("g0", "its node is drained", 0.3)
    assert time.monotonic() - before >= 0.3
    assert await task == wanted(given)


async def test_a_round_waits_for_who_is_expected_and_its_deadline_stays() -> None:
    world = await World(Generator("g0", delay=0.005)).admitted()
    task = asyncio.create_task(world.sample(given := requests(20)))
    await asyncio.sleep(0.02)
    world.fleet.expect("g0")
    await world.fleet.drain("g0", "its node is drained", 0.0)
    await asyncio.sleep(0.1)
    assert not task.done()
    world.fleet.add("g0", Generator("g0"))
    assert await task == wanted(given)
    world.fleet.expect("g0")
    await world.fleet.drain("g0", "its node is drained", 0.0)
    with pytest.raises(DeadlineError, match=r"g0 is retired \(its node is drained\)"):
        await world.sample(requests(2), deadline=0.2)


async def test_the_last_one_that_leaves_with_nobody_expected_ends_the_round() -> None:
    world = await World(Generator("g0", delay=0.005)).admitted()
    task = asyncio.create_task(world.sample(requests(60)))
    await asyncio.sleep(0.02)
    await world.fleet.drain("g0", "its node is drained", 0.0)
    with pytest.raises(RLHFError, match=r"no generator serves a proved version: g0 is retired \(its node is drained\)"):
        await task


async def test_an_update_waits_for_the_first_who_is_expected_but_not_for_ever() -> None:
    world = await World(Generator("g0")).admitted()
    world.fleet.expect("g0")
    await world.fleet.drain("g0", "its node is drained", 0.0)
    world.fleet.expect_s = 0.3
    await world.fleet.recovered()
    assert world.fleet.running() == []
    world.fleet.expect_s = 30.0
    world.fleet.expect("g0")
    task = asyncio.create_task(world.fleet.recovered())
    await asyncio.sleep(0.1)
    assert not task.done()
    world.fleet.add("g0", Generator("g0"))
    await task
    assert world.fleet.running() == ["g0"]


async def test_an_update_does_not_wait_for_ever_for_a_member_whose_node_is_gone() -> None:
    world = await World(Generator("g0")).admitted()
    world.gate = asyncio.Event()  # no node comes
    world.fleet.lost("g0", "its node is gone", world.fleet.handle("g0"))
    world.fleet.expect_s = 0.3
    async with asyncio.timeout(10):
        await world.fleet.recovered()
    assert world.fleet.running() == []
    world.fleet.expect_s = 30.0
    task = asyncio.create_task(world.fleet.recovered())
    await asyncio.sleep(0.3)
    assert not task.done()
    world.gate.set()
    await task
    assert world.fleet.running() == ["g0"]


class Nodes:
    """Places on a few nodes, one generator each, and what is said of them: a launcher for `Elastic`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *free: str) -> None:
        self.free = list(free)
        self.at: dict[str, str] = {}
        self.draining: dict[str, int] = {}
        self.failures = 0
        self.started: list[str] = []
        monkeypatch.setattr(elastic_module.cluster_state, "get_draining_nodes", lambda: self.draining)
        monkeypatch.setattr(elastic_module, "WATCH_S", 0.02)
        monkeypatch.setattr(elastic_module, "FIRST_PAUSE_S", 0.05)

    async def wait_for_place(self, name: str) -> str:
        while not self.free:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)
        self.at[name] = self.free.pop(0)
        return self.at[name]

    async def check(self, node: str) -> None:
        if node == "node-odd":
            raise RLHFError("node-odd has torch 1.0, this process has 2.0")

    async def launch(self, name: str) -> Generator:
        if self.failures:
            self.failures -= 1
            raise RLHFError("no memory left")
        self.started.append(name)
        return Generator(name, delay=0.002)

    async def leave_place(self, name: str) -> None:
        node = self.at.pop(name)
        if node not in self.draining and node != "node-odd":
            self.free.append(node)

    def nodes(self) -> dict[str, str]:
        return dict(self.at)


async def test_generators_fill_the_nodes_leave_drained_ones_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(monkeypatch)
    nodes.at["generator-0"] = "node-a"
    world = await World(Generator("generator-0", delay=0.002)).admitted()
    fleet = world.fleet
    elastic = Elastic(fleet, nodes, nodes.check, Replicas(min=1, max=3), 30.0, world.alerts.append)  # type: ignore[arg-type]
    task = asyncio.create_task(elastic.run())
    sampling = asyncio.create_task(world.sample(given := requests(400)))
    await asyncio.sleep(0.05)
    assert fleet.members() == ["generator-0"]
    nodes.free.append("node-b")
    await until(lambda: len(fleet.taking()) == 2)
    assert nodes.at == {"generator-0": "node-a", nodes.started[0]: "node-b"}
    # The first one's node is taken away; its place is asked for anew, and it comes back where there is room.
    nodes.draining["node-a"] = int(1000 * (time.time() + 60))
    await until(lambda: "node-a" not in nodes.at.values())
    await until(lambda: len(fleet.taking()) == 1)
    nodes.failures = 1
    nodes.free += ["node-c", "node-odd"]
    await until(lambda: "could not join on node node-odd: node-odd has torch 1.0" in "\n".join(world.alerts))
    nodes.free.append("node-d")
    await until(lambda: len(fleet.taking()) == 3)
    assert set(nodes.at.values()) == {"node-b", "node-c", "node-d"}
    assert await sampling == wanted(given)
    task.cancel()
    said = "\n".join(world.alerts)
    assert f"{nodes.started[0]} joins on node node-b" in said
    assert "generator-0 leaves: node node-a is being drained, 5" in said
    assert "could not join on node node-c: no memory left; next try in 0 s" in said


async def test_it_says_how_many_are_missing_below_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_module, "REPORT_S", 0.05)
    monkeypatch.setattr(elastic_module, "free_resources", lambda: "1 CPU")
    nodes = Nodes(monkeypatch)
    nodes.at |= {"generator-0": "node-a", "generator-1": "node-b"}
    world = await World(Generator("generator-0"), Generator("generator-1")).admitted()
    elastic = Elastic(world.fleet, nodes, nodes.check, Replicas(min=2, max=3), 30.0, world.alerts.append)  # type: ignore[arg-type]
    task = asyncio.create_task(elastic.run())
    await asyncio.sleep(0.2)
    assert world.alerts == []
    nodes.draining["node-b"] = 0
    line = "waiting for places: 1 generators fewer than generator.replicas.min; free now: 1 CPU"
    await until(lambda: line in world.alerts)
    task.cancel()
