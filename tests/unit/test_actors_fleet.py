"""The fleet over in-process generators that die, hang and come back: every response once, whoever gave it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import DeadlineError, EngineLostError, PayloadError, RLHFError
from rlhf.health import State
from rlhf.records import Prompt, SampleRequest
from tests.unit.fleet_world import Generator, Remote, World, requests, wanted

pytestmark = pytest.mark.timeout(60)


async def test_what_a_dead_member_had_not_given_is_sampled_by_others_with_the_same_seeds() -> None:
    dying, other = Generator("g0", dies_after=5), Generator("g1", delay=0.001)
    world = await World(dying, other).admitted()
    assert await world.sample(given := requests(24, 3)) == wanted(given)
    spare = world.generators["g0"]
    # What had arrived was not sampled again.
    assert Counter(dying.given + other.given + (spare.given if spare is not dying else [])) == Counter(
        wanted(given).values()
    )
    await world.fleet.recovered()
    assert world.fleet.state("g0") == State.HEALTHY
    assert world.fleet.metrics() == {"fleet/members": 2.0, "fleet/restarts": 1.0}
    assert world.fleet.metrics()["fleet/restarts"] == 0.0
    [alert] = world.alerts
    assert alert.startswith("g0 is started again: died while sampling")


async def test_a_member_that_comes_back_joins_the_round_that_runs() -> None:
    world = await World(Generator("g0", dies_after=1), Generator("g1", delay=0.01)).admitted()
    assert await world.sample(given := requests(60)) == wanted(given)
    assert world.generators["g0"].given, "the new process took part"


async def test_sampling_waits_while_all_members_are_being_started_again() -> None:
    world = await World(Generator("g0", dies_after=3)).admitted()
    world.gate = asyncio.Event()
    task = asyncio.create_task(world.sample(given := requests(10)))
    await asyncio.sleep(0.2)
    assert not task.done()
    assert (world.fleet.members(), world.fleet.running()) == (["g0"], [])
    world.gate.set()
    assert await task == wanted(given)


async def test_the_deadline_stays_while_sampling_waits_and_says_where_everybody_is() -> None:
    world = await World(Generator("g0", dies_after=3)).admitted()
    world.gate = asyncio.Event()
    with pytest.raises(DeadlineError, match=r"not all of 20 responses came within 0 s; g0 is restarting"):
        await world.sample(requests(10), deadline=0.3)


async def test_nobody_left_and_the_budget_spent_is_one_clear_error() -> None:
    spares = [Generator("g0", dies_after=0), Generator("g0", dies_after=0)]
    world = await World(Generator("g0", dies_after=1), spares=spares, budget=2).admitted()
    with pytest.raises(RLHFError) as error:
        await world.sample(requests(10))
    message = str(error.value)
    assert message.startswith("no generator serves a proved version: g0 is retired (died while sampling")
    assert "the restarts are spent (cluster.restarts: 2 in 3600 s)" in message
    assert "\n" not in message
    assert len(world.alerts) == 3
    # The next round is told at once, and publishing still has somebody to name.
    with pytest.raises(RLHFError, match="g0 is retired"):
        await world.sample(requests(1))
    assert world.fleet.members() == ["g0"]


async def test_others_go_on_when_one_is_gone_for_good() -> None:
    world = await World(Generator("g0", dies_after=1), Generator("g1"), budget=0).admitted()
    assert await world.sample(given := requests(12)) == wanted(given)
    assert world.fleet.members() == ["g1"]
    assert world.alerts == ["g0 is gone for good: " + world.fleet._members["g0"].health.reason]


async def test_a_start_that_fails_is_tried_again_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.reviving.FIRST_PAUSE_S", 0.01)
    spares = [RLHFError("out of memory"), Generator("g0")]
    world = await World(Generator("g0", dies_after=1), spares=spares).admitted()
    assert await world.sample(given := requests(6)) == wanted(given)
    assert ["could not be started: out of memory" in alert for alert in world.alerts] == [False, True]


@pytest.mark.parametrize("answers", [True, False])
async def test_a_wedged_member_is_replaced_though_it_answers(answers: bool) -> None:
    """It says how many tokens it has sampled whenever it is asked, and the number never grows."""
    wedged = Generator("g0", wedged=True)
    if not answers:
        wedged.progress = Remote(lambda: asyncio.sleep(60))
    world = await World(wedged, Generator("g1"), token_s=0.4).admitted()
    assert await world.sample(given := requests(12)) == wanted(given)
    assert wedged.given == []
    assert any("gave nothing for" in alert for alert in world.alerts)
    await world.fleet.recovered()
    assert world.fleet.state("g0") == State.HEALTHY


async def test_a_slow_member_is_left_alone_while_its_tokens_come() -> None:
    """No response for three deadlines: but its count of tokens grows."""
    slow = Generator("g0", wedged=True)
    slow.counts = True
    world = await World(slow, token_s=0.3).admitted()
    task = asyncio.create_task(world.sample(given := requests(2)))
    await asyncio.sleep(1.0)
    slow.wedged = False
    assert await task == wanted(given)
    assert world.alerts == []


async def test_a_suspect_gets_no_new_work_and_is_trusted_again_when_it_answers() -> None:
    slow, other = Generator("g0", wedged=True), Generator("g1", delay=0.02)
    world = await World(slow, other, token_s=2.0).admitted()
    task = asyncio.create_task(world.sample(given := requests(40)))
    async with asyncio.timeout(5):
        while world.fleet.state("g0") != State.SUSPECT:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)
    assert world.fleet.taking() == ["g1"]
    slow.wedged = False
    assert await task == wanted(given)
    assert world.fleet.state("g0") == State.HEALTHY
    assert world.alerts == []


async def test_a_failed_proof_or_a_dead_engine_process_sends_its_prompts_to_others() -> None:
    class Unproved(Generator):
        async def _sample(self, chunk: list[SampleRequest], sampling: dict[str, Any]) -> AsyncIterator[Any]:
            raise EngineLostError("g0: version 1 gives log-probs 3 off the learner's")
            yield

    world = await World(Unproved("g0"), Generator("g1")).admitted()
    assert await world.sample(given := requests(8)) == wanted(given)
    assert "version 1 gives log-probs 3 off" in world.alerts[0]


async def test_any_other_error_ends_the_round_at_once() -> None:
    class Broken(Generator):
        async def _sample(self, chunk: list[SampleRequest], sampling: dict[str, Any]) -> AsyncIterator[Any]:
            raise ValueError("a mistake of ours")
            yield

    world = await World(Broken("g0"), Generator("g1", delay=0.01)).admitted()
    with pytest.raises(ValueError, match="a mistake of ours"):
        await world.sample(requests(8))
    assert world.alerts == []


async def test_a_member_that_dies_before_it_is_admitted_is_started_again() -> None:
    dead = Generator("g0")
    dead.dead = True
    world = await World(dead, Generator("g1")).admitted()
    await world.fleet.recovered()
    assert world.fleet.taking() == ["g0", "g1"]


async def test_who_gets_no_payload_waits_for_the_next_version() -> None:
    world = await World(Generator("g0", dies_after=1), Generator("g1")).admitted()

    async def refused(name: str) -> RLHFError | None:
        return PayloadError("the learner's buffers are gone")

    world.fleet.catch_up = refused
    assert await world.sample(given := requests(8)) == wanted(given)
    await world.fleet.recovered()
    assert world.fleet.state("g0") == State.STALE
    assert world.alerts[-1] == "g0 waits for the next version: the learner's buffers are gone"
    await world.fleet.admit("g0", 0)
    assert world.fleet.taking() == ["g0", "g1"]


async def test_a_suspended_member_is_not_asked_until_it_is_admitted_again() -> None:
    world = await World(Generator("g0"), Generator("g1")).admitted()
    await world.fleet.suspend("g0")
    assert await world.sample(given := requests(8)) == wanted(given)
    assert world.generators["g0"].given == []
    await world.fleet.admit("g0", 0)
    assert world.fleet.taking() == ["g0", "g1"]


async def test_two_calls_at_once_both_get_their_own() -> None:
    world = await World(Generator("g0", dies_after=7, delay=0.001), Generator("g1", delay=0.001)).admitted()
    one, two = requests(15), [SampleRequest(Prompt(f"v{n}", (), "", (n,)), (n,)) for n in range(20)]
    assert await asyncio.gather(world.sample(one), world.sample(two)) == [wanted(one), wanted(two)]
    assert world.fleet._watcher is None


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.integers(0, 30),
    samples=st.integers(1, 3),
    dies=st.lists(st.one_of(st.none(), st.integers(0, 12)), min_size=1, max_size=3),
    spares=st.lists(st.integers(0, 12), max_size=3),
)
def test_every_response_comes_once_whoever_dies_when(
    prompts: int, samples: int, dies: list[int | None], spares: list[int]
) -> None:
    async def run() -> None:
        members = [Generator(f"g{index}", dies_after=after) for index, after in enumerate(dies)]
        # Spares are named after nobody: only their answers count.
        world = await World(*members, spares=[Generator("spare", dies_after=n) for n in spares], budget=20).admitted()
        given = requests(prompts, samples)
        assert await world.sample(given) == wanted(given)
        await world.fleet.recovered()

    asyncio.run(run())


async def test_an_engine_that_has_just_proved_a_version_is_not_asked_again() -> None:
    asked: list[str] = []

    class Asked(Generator):
        async def _version(self) -> int:
            asked.append(self.name)
            return await super()._version()

    one, two = Asked("g0"), Asked("g1")
    world = World(one, two)
    world.fleet.proved("g0", 1, one)
    world.fleet.proved("g1", 1, one)  # news of a process that is not there any more
    await world.fleet.admit("g0", 1)
    assert (asked, world.fleet.taking()) == ([], ["g0"])
    with pytest.raises(RLHFError, match="g1 cannot be admitted with version 1: it has proved 0"):
        await world.fleet.admit("g1", 1)
    assert asked == ["g1"]
    # A proof is good once, for its own version, and not after a stop in between.
    for version, meanwhile in ((1, None), (2, None), (1, world.fleet.suspend)):
        if version != 1 or meanwhile:
            world.fleet.proved("g0", 1, one)
        if meanwhile:
            await meanwhile("g0")
        with pytest.raises(RLHFError, match=f"g0 cannot be admitted with version {version}: it has proved 0"):
            await world.fleet.admit("g0", version)
    assert asked == ["g1", "g0", "g0", "g0"]


async def test_a_dead_process_proof_is_gone_with_it() -> None:
    dying = Generator("g0", dies_after=0)
    world = await World(dying, Generator("g1")).admitted()
    world.fleet.proved("g0", 7, dying)
    assert await world.sample(given := requests(4)) == wanted(given)
    await world.fleet.recovered()
    with pytest.raises(RLHFError, match="g0 cannot be admitted with version 7: it has proved 0"):
        await world.fleet.admit("g0", 7)
