"""Calls that travel by relays: what members answer, raise and stream, and what a lost relay or member costs."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors import relay as relays_module
from actors.calls import ActorDiedError, within
from actors.relay import MEMBERS, Line, RelayLostError, Relays, UnexpectedError
from rlhf.errors import EngineLostError
from rlhf.packed import token_ids
from rlhf.records import Prompt, SampleRequest
from rlhf.wire import PackedRequests

pytestmark = pytest.mark.usefixtures("cluster")


class Member:
    """Counts, waits, fails."""

    def __init__(self, name: str):
        self._name = name
        self._gate = asyncio.Event()
        self.calls = 0

    async def hello(self, greeting: str) -> str:
        return f"{greeting} from {self._name}"

    async def requests(self, given: list[SampleRequest]) -> tuple[str, list[SampleRequest]]:
        return type(given).__name__, given

    async def lost(self) -> None:
        raise EngineLostError(f"{self._name} is of no use")

    async def broken(self) -> None:
        raise KeyError("nobody expects this")

    async def items(self, count: int) -> AsyncIterator[int]:
        """Numbers; the second half waits for the gate."""
        self.calls += 1
        for number in range(count):
            if number == count // 2:
                await self._gate.wait()
            yield number

    async def held(self) -> int:
        """An answer that waits for the gate."""
        self.calls += 1
        await self._gate.wait()
        return self.calls

    async def open(self) -> int:
        self._gate.set()
        return self.calls

    async def pid(self) -> int:
        return os.getpid()


async def gather(count: int, alerts: list[str] | None = None) -> tuple[dict[str, Any], dict[str, Any], Relays]:
    """Members' actors, what stands for them, and the relays; four members share a process only in name."""
    actor = ray.remote(num_cpus=0, max_concurrency=1000)(Member)
    actors = {f"m{n}": actor.remote(f"m{n}") for n in range(count)}
    relays = Relays((alerts if alerts is not None else []).append)
    node = ray.get_runtime_context().get_node_id()
    return actors, {name: await relays.handle(name, actor, node) for name, actor in actors.items()}, relays


def streamed(handle: Any, count: int) -> Any:
    return handle.items.options(num_returns="streaming").remote(count)


async def numbers(handle: Any, count: int, seen: list[int] | None = None) -> list[int]:
    found = [] if seen is None else seen
    async for reference in streamed(handle, count):
        found.append(await reference)
    return found


async def kill_relay(line: Line) -> None:
    pid = await line._relay.__ray_call__.remote(lambda self: os.getpid())
    os.kill(pid, signal.SIGKILL)


async def until_calls(handle: Any, count: int) -> None:
    async with asyncio.timeout(30):
        while await handle.__ray_call__.remote(lambda self: self.calls) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_calls_of_one_moment_are_one_post_and_each_gets_its_own_answer(monkeypatch):
    posts: list[int] = []
    post = Line._post

    async def counted(self: Line, calls: Any) -> None:
        posts.append(len(calls))
        await post(self, calls)

    monkeypatch.setattr(Line, "_post", counted)
    monkeypatch.setattr(relays_module, "MEMBERS", 3)
    _, handles, _ = await gather(4)
    names = list(handles)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(handles[name].hello.remote(f"call {n}") for n in range(3) for name in names))
    assert answers == [f"call {n} from {name}" for n in range(3) for name in names]
    assert posts == [9, 3]
    await asyncio.gather(*(handle.open.remote() for handle in handles.values()))
    async with asyncio.timeout(60):
        found = await asyncio.gather(*(numbers(handles[name], 4) for name in names), handles["m0"].hello.remote("hi"))
    assert found == [[0, 1, 2, 3]] * 4 + ["hi from m0"]
    # One call is made before the loop gets to the streams, which are made in one moment again.
    assert posts[4:] == [1, 3, 1]
    assert MEMBERS == 128


async def test_requests_stay_columns_on_their_way():
    _, handles, _ = await gather(1)
    prompt = Prompt("u", (), "", token_ids([1, 2]))
    given = PackedRequests([SampleRequest(prompt, (3, 4))])
    assert await within(handles["m0"].requests.remote(given), 60, "requests") == ("PackedRequests", given)


async def test_errors_arrive_as_they_do_without_a_relay():
    actors, handles, _ = await gather(2)
    with pytest.raises(EngineLostError, match="m0 is of no use"):
        await within(handles["m0"].lost.remote(), 60, "lost")
    with pytest.raises(UnexpectedError, match=r"(?s)Member.broken.*in broken.*KeyError: 'nobody expects this'"):
        await within(handles["m0"].broken.remote(), 60, "broken")
    pending, others = asyncio.ensure_future(numbers(handles["m1"], 2)), asyncio.ensure_future(numbers(handles["m0"], 2))
    await until_calls(actors["m1"], 1)
    os.kill(await handles["m1"].pid.remote(), signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError, match="died"):
        await asyncio.wait_for(pending, 60)
    with pytest.raises(ActorDiedError, match="hello: the actor died"):
        await within(handles["m1"].hello.remote("hi"), 60, "hello")
    # What it left waiting in the same post goes on.
    await handles["m0"].open.remote()
    assert await asyncio.wait_for(others, 60) == [0, 1]


async def test_a_member_that_is_replaced_answers_under_its_old_name():
    actors, _, relays = await gather(1)
    ray.kill(actors["m0"])
    fresh = ray.remote(num_cpus=0)(Member).remote("m0 again")
    handle = await relays.handle("m0", fresh, ray.get_runtime_context().get_node_id())
    assert await within(handle.hello.remote("hi"), 60, "hello") == "hi from m0 again"


async def lost(call: Any) -> RelayLostError:
    with pytest.raises(RelayLostError) as caught:
        await asyncio.wait_for(call, 60)
    return caught.value


async def test_a_lost_relay_says_so_to_all_that_wait_and_costs_no_member():
    alerts: list[str] = []
    actors, handles, relays = await gather(2, alerts)
    pids = await asyncio.gather(*(handle.pid.remote() for handle in handles.values()))
    seen: list[int] = []
    stream = asyncio.create_task(numbers(handles["m0"], 6, seen))
    answer = asyncio.ensure_future(handles["m1"].held.remote())
    await until_calls(actors["m0"], 1)
    await until_calls(actors["m1"], 1)
    async with asyncio.timeout(30):
        while len(seen) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    [line] = relays._lines
    await kill_relay(line)
    assert str(await lost(stream)).startswith("relay-0: ")
    await lost(answer)
    assert seen == [0, 1, 2]
    # Another one takes its place, and knows everybody.
    assert await asyncio.gather(*(handle.pid.remote() for handle in handles.values())) == pids
    # What had been asked goes on: a member is not told that nobody listens any more.
    assert await handles["m1"].open.remote() == 1
    [alert] = alerts
    assert alert.startswith("relay-0 is started again: ")


async def test_a_wedged_relay_is_lost_too(monkeypatch):
    alerts: list[str] = []
    actors, handles, relays = await gather(1, alerts)
    await handles["m0"].pid.remote()
    monkeypatch.setattr(relays_module, "SILENT_S", 2.0)
    pid = await relays._lines[0]._relay.__ray_call__.remote(lambda self: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    assert str(await lost(handles["m0"].hello.remote("hi"))) == "relay-0: says nothing for 2 s"
    monkeypatch.setattr(relays_module, "SILENT_S", 60.0)
    assert await within(handles["m0"].hello.remote("hi"), 60, "hello") == "hi from m0"
    monkeypatch.setattr(relays_module, "SILENT_S", 2.0)
    pid = await relays._lines[0]._relay.__ray_call__.remote(lambda self: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    # Nor does it keep a member from taking its place.
    handle = await asyncio.wait_for(relays.handle("m0", actors["m0"], ray.get_runtime_context().get_node_id()), 60)
    monkeypatch.setattr(relays_module, "SILENT_S", 60.0)
    assert await within(handle.hello.remote("again"), 60, "hello") == "again from m0"
    assert len(alerts) == 2


async def test_a_post_that_gives_nothing_shows_that_it_is_alive(monkeypatch):
    monkeypatch.setattr(relays_module, "BEAT_S", 0.05)
    gate = asyncio.Event()

    class Slow:
        async def answer(self) -> str:
            await gate.wait()
            return "done"

    slow = Slow()
    method = SimpleNamespace(remote=slow.answer)
    relay = relays_module.Relay({"m0": SimpleNamespace(answer=method)})
    given = []
    async for parts in relay.carry([relays_module.Call("m0", "answer", (), False)]):
        given.append(parts)
        if len(given) == 3:
            gate.set()
    assert given[:3] == [[], [], []]
    assert given[-1] == [(0, "end", "done")]


async def test_a_start_that_fails_reaches_whoever_waits(monkeypatch):
    _, handles, _ = await gather(1)

    async def there(self: Line) -> Any:
        raise ray.exceptions.RaySystemError("no memory for a process")

    monkeypatch.setattr(Line, "_there", there)
    assert "no memory" in str(await lost(handles["m0"].hello.remote("hi")))
    assert "no memory" in str(await lost(numbers(handles["m0"], 2)))


async def test_a_fault_in_what_is_asked_is_told_and_costs_no_relay():
    alerts: list[str] = []
    _, handles, relays = await gather(1, alerts)
    with pytest.raises(TypeError, match="cannot pickle"):
        await asyncio.wait_for(handles["m0"].hello.remote(threading.Lock()), 60)
    nobody = relays_module.Call("nobody", "hello", ("hi",), False)
    with pytest.raises(UnexpectedError, match="KeyError: 'nobody'"):
        await asyncio.wait_for(relays._lines[0].call(nobody), 60)
    assert await within(handles["m0"].hello.remote("hi"), 60, "hello") == "hi from m0"
    assert alerts == []
