"""The health of a member: every change of state there is, and what no order of events can bring about."""

import time
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.health import RUNNING, SERVING, Event, Health, RestartBudget, State, after

H, S, D, R, T, X = State.HEALTHY, State.SUSPECT, State.DEAD, State.RESTARTING, State.STALE, State.RETIRED

TABLE = {
    #                  H  S  D  R  T  X
    Event.ANSWERED: (H, H, D, R, T, X),
    Event.MISSED: (S, D, D, R, T, X),
    Event.DIED: (D, D, D, D, D, X),
    Event.RESTART_BEGUN: (H, S, R, R, T, X),
    Event.RESTARTED: (H, S, D, T, T, X),
    Event.PROVED: (H, H, D, R, H, X),
    Event.OVERTAKEN: (T, T, D, R, T, X),
    Event.RETIRED: (X, X, X, X, X, X),
}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(budget: int = 2, window_s: float = 100.0, deadline_s: float = 10.0) -> tuple[Health, Clock, RestartBudget]:
    clock = Clock()
    restarts = RestartBudget(budget, window_s, clock)
    return Health(restarts, deadline_s, clock), clock, restarts


@pytest.mark.parametrize(("column", "event"), list(product(range(6), Event)))
def test_every_state_and_every_event(column: int, event: Event) -> None:
    assert after((H, S, D, R, T, X)[column], event) == TABLE[event][column]


def test_a_life() -> None:
    health, clock, budget = make()
    assert health.state == T
    assert health.proved(0)
    health.working()
    clock.now += 4.9
    assert health.check() == H
    clock.now += 0.1
    assert health.check() == S
    health.answered()
    assert health.state == H
    clock.now += 9.0
    assert health.check() == S
    clock.now += 1.0
    assert health.check() == D
    assert (health.version, health.silent_s()) == (None, 0.0)
    assert "gave nothing for 10 s" in health.reason
    assert health.begin_restart()
    assert (health.state, budget.left()) == (R, 1)
    health.restarted()
    assert (health.state, health.version) == (T, None)
    assert health.proved(3)
    assert (health.state, health.version) == (H, 3)


def test_nothing_is_expected_of_a_member_without_work() -> None:
    health, clock, _ = make()
    health.proved(0)
    clock.now += 1e6
    assert (health.check(), health.silent_s()) == (H, 0.0)
    health.working()
    clock.now += 5.0
    assert health.check() == S
    health.idle()
    clock.now += 1e6
    assert health.check() == H


def test_one_look_kills_nobody() -> None:
    """Who watches may have been stopped himself: the silence was his."""
    health, clock, _ = make()
    health.proved(0)
    health.working()
    clock.now += 1e6
    assert health.check() == S
    health.answered()
    assert health.check() == H


def test_a_proof_of_a_version_that_was_overtaken_admits_nobody() -> None:
    health, _, _ = make()
    assert health.proved(4)
    health.published(5)
    assert health.state == T
    assert not health.proved(4)
    assert health.state == T
    assert health.proved(5)
    health.published(5)
    assert health.state == H
    health.published(3)  # the learner went back to a checkpoint
    assert health.state == T
    assert not health.proved(5)
    assert health.proved(3)
    health.overtaken()
    assert health.state == T


def test_news_of_a_process_that_is_gone_changes_nothing() -> None:
    health, _, budget = make()
    health.proved(0)
    health.died("killed")
    health.answered()
    assert not health.proved(0)
    assert health.state == D
    assert health.begin_restart()
    assert not health.begin_restart()
    assert (health.state, budget.taken) == (R, 1)
    health.answered()
    assert not health.proved(0)
    assert health.state == R


def test_the_budget_is_a_sliding_window() -> None:
    clock = Clock()
    budget = RestartBudget(2, 100.0, clock)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    clock.now += 99.9
    assert not budget.take()
    clock.now += 0.1
    assert (budget.left(), budget.taken) == (2, 2)
    assert budget.take()
    assert RestartBudget(0, 1.0).take() is False


def test_a_jump_of_the_wall_clock_moves_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = RestartBudget(1, 3600.0)
    health = Health(budget, 10.0)
    health.proved(0)
    health.working()
    assert budget.take()
    wall = time.time()
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: wall + jump)
        assert health.check() == H
        assert health.silent_s() < 5.0
        assert not budget.take()


STEPS = st.one_of(
    st.sampled_from(["answered", "working", "idle", "died", "begin_restart", "restarted", "check", "overtaken"]),
    st.tuples(st.sampled_from(["proved", "published"]), st.integers(0, 3)),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 5.0, 40.0])),
    st.just("retire"),
)


@given(steps=st.lists(st.tuples(st.integers(0, 1), STEPS), max_size=80))
def test_no_order_of_events_breaks_a_promise(steps: list) -> None:
    clock = Clock()
    budget = RestartBudget(2, 100.0, clock)
    members = [Health(budget, 10.0, clock) for _ in range(2)]
    begun: list[float] = []
    published: int | None = None
    path: list[list[State]] = [[T], [T]]
    proof: list[bool] = [False, False]
    for index, step in steps:
        health = members[index]
        before = health.state
        name, argument = step if isinstance(step, tuple) else (step, None)
        match name:
            case "wait":
                clock.now += argument
            case "proved":
                proof[index] = health.proved(argument)
                assert not proof[index] or published in (None, argument)
            case "published":
                published = argument
                for each in members:
                    each.published(argument)
            case "died" | "retire":
                getattr(health, name)("why")
            case "begin_restart":
                if health.begin_restart():
                    assert before == D
                    begun.append(clock.now)
            case _:
                getattr(health, name)()
        for each, states in zip(members, path, strict=True):
            if each.state != states[-1]:
                states.append(each.state)
            # Who serves has proved what is served, in the process that runs now.
            assert (each.state not in SERVING) or (each.version is not None and published in (None, each.version))
            assert (each.state in RUNNING) or each.version is None
        # To HEALTHY only from SUSPECT, or from STALE by a proof.
        if health.state == H and before not in (H, S):
            assert before == T
            assert name == "proved"
            assert proof[index]
    for states in path:
        for one, two in pairwise(states):
            assert (one, two) not in {(D, H), (R, H), (D, S), (R, S), (D, T), (T, R), (T, S)}
            assert one != X
    # In no window more restarts than the budget.
    assert len(begun) == budget.taken
    for number, moment in enumerate(begun):
        assert sum(moment <= other < moment + 100.0 for other in begun[number:]) <= 2
