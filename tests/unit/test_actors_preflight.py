"""What a run asks of a cluster against what its nodes have, and how long it waits for the rest."""

import asyncio
import shutil
import tempfile
import time

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.placement import Patience, check, place
from actors.preflight import Role, amounts, room, rows, shortages
from rlhf.config.placement import RolePlacement
from rlhf.errors import DeadlineError, RLHFError

LEARNER = Role("learner", count=2, cpus=2, gpus=0, strategy="PACK")
ENGINE = Role("generator", count=3, cpus=1, gpus=2, strategy="PACK")


@pytest.mark.parametrize(
    ("role", "nodes", "expected"),
    [
        (LEARNER, [{"CPU": 4.0}], 2),
        (LEARNER, [{"CPU": 2.0}, {"CPU": 3.0}], 2),
        (LEARNER, [{"CPU": 3.0}, {"CPU": 1.0}], 1),  # enough in all, but no actor spans two nodes
        (LEARNER, [], 0),
        (ENGINE, [{"CPU": 8.0, "GPU": 6.0}], 3),
        (ENGINE, [{"CPU": 2.0, "GPU": 4.0}, {"CPU": 64.0}, {"CPU": 1.0, "GPU": 8.0}], 3),
        (ENGINE, [{"CPU": 64.0}], 0),
        (ENGINE, [{"CPU": 8.0, "GPU": 1.0}] * 6, 0),
        (Role("judge", 1, 1, 0.25, "SPREAD"), [{"CPU": 9.0, "GPU": 1.0}], 4),
        (Role("judge", 1, 1, 0, "SPREAD", {"mig": 2}), [{"CPU": 9.0, "mig": 5.0}], 2),
    ],
)
def test_room_counts_actors_that_fit_empty_nodes(role, nodes, expected):
    assert room(role, nodes) == expected
    assert bool(shortages([role], nodes)) == (expected < role.count)


def test_shortages_say_what_is_asked_and_what_is_there():
    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0}]
    assert shortages([ENGINE], nodes) == [
        "3 generator actors of 1 CPU + 2 GPU where 0 fit",
        "6 GPU in all where there are 1",
    ]
    # Each fits by itself, not both.
    both = [Role("learner", 1, 1, 1, "PACK"), Role("generator", 1, 1, 1, "PACK")]
    assert shortages(both, nodes) == ["2 GPU in all where there are 1"]


ROLES = st.builds(Role, st.just("role"), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.just("PACK"))


@given(st.lists(ROLES, min_size=1, max_size=3), st.lists(st.booleans(), min_size=8, max_size=40))
def test_what_was_placed_is_never_called_impossible(roles, fresh):
    """Nodes are built around the actors, so that they fit by construction."""
    bundles = [role.bundle() for role in roles for _ in range(role.count)]
    nodes: list[dict[str, float]] = []
    for bundle, alone in zip(bundles, fresh, strict=False):
        if alone or not nodes:
            nodes.append({})
        for name, amount in bundle.items():
            nodes[-1][name] = nodes[-1].get(name, 0) + amount
    for bundle in bundles[len(fresh) :]:
        nodes.append(dict(bundle))
    assert shortages(roles, nodes) == []


def test_the_table():
    assert rows([ENGINE, LEARNER], [{"CPU": 4.0, "GPU": 5.0}]) == [
        ["generator", "3", "1 CPU + 2 GPU", "pack", "2"],
        ["learner", "2", "2 CPU", "pack", "2"],
    ]
    assert amounts({"CPU": 1.0, "GPU": 0.3333, "mig": 0}) == "1 CPU + 0.3333 GPU"


def test_a_role_is_placed_as_the_config_says():
    placement = RolePlacement(strategy="STRICT_SPREAD", resources={"nic": 1}, labels={"zone": "a"})
    placed = LEARNER.placed(placement)
    assert placed.bundle() == {"CPU": 2, "nic": 1}
    assert (placed.strategy, dict(placed.labels)) == ("STRICT_SPREAD", {"zone": "a"})
    assert LEARNER.placed(RolePlacement()) == LEARNER


@pytest.mark.parametrize("resources", [{"GPU": 1}, {"CPU": 2}, {"nic": 0}, {"nic": -1}])
def test_resources_of_a_role_are_custom_ones(resources):
    with pytest.raises(ValidationError, match=f"resources.{next(iter(resources))} "):
        RolePlacement(resources=resources)


@pytest.fixture(scope="module")
def cluster():
    folder = tempfile.mkdtemp(prefix="rlhf-t-")
    ray.init(num_cpus=3, resources={"nic": 1}, labels={"zone": "a"}, include_dashboard=False, _temp_dir=folder)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_what_can_never_fit_stops_at_once_unless_nodes_may_come(cluster):
    roles = [Role("generator", 2, 1, 1, "PACK"), LEARNER]
    with pytest.raises(RLHFError) as error:
        check(roles, Patience(60))
    message = str(error.value)
    assert "\n" not in message
    assert "2 generator actors of 1 CPU + 1 GPU where 0 fit" in message
    assert "2 learner actors of 2 CPU where 1 fit" in message
    assert "6 CPU in all where there are 3" in message
    told: list[str] = []
    check(roles, Patience(60, grows=True, tell=told.append))
    assert len(told) == 1
    assert "waiting for nodes" in told[0]


async def test_a_wait_says_what_is_missing_and_ends(cluster, monkeypatch):
    monkeypatch.setattr("actors.placement.REPORT_S", 0.3)
    first = await place(Role("learner", 1, 1, 0, "PACK", {"nic": 1}, {"zone": "a"}), Patience(30))
    assert ray.util.placement_group_table(first)["state"] == "CREATED"
    told: list[str] = []
    started = time.monotonic()
    with pytest.raises(
        DeadlineError, match=r"placing 1 judge actors of 1 CPU \+ 1 nic took longer than 1 s; free now: 2 CPU"
    ):
        await place(Role("judge", 1, 1, 0, "SPREAD", {"nic": 1}), Patience(1.0, tell=told.append))
    assert time.monotonic() - started < 5
    assert 2 <= len(told) <= 4
    assert all("waiting for places: 1 judge actors of 1 CPU + 1 nic; free now: 2 CPU" in line for line in told)
    # What is given back in time is taken.
    waiting = asyncio.create_task(place(Role("judge", 1, 1, 0, "SPREAD", {"nic": 1}), Patience(30, tell=told.append)))
    await asyncio.sleep(0.5)
    ray.util.remove_placement_group(first)
    assert ray.util.placement_group_table(await waiting)["state"] == "CREATED"
