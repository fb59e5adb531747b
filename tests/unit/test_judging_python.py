"""The user's own function: how it is found, called and held to its contract."""

import asyncio
import math
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.judge import PythonJudge as Config
from rlhf.errors import InputError, RLHFError
from rlhf.judging.python_judge import PythonJudge
from rlhf.judging.verdicts import sigmoid
from rlhf.records import Comparison, Message, Verdict, VerdictState

MODULE = """
import asyncio, threading

CALLS, VALUES, THREADS, ACTIVE, MOST = [], {}, set(), 0, 0

def length(messages, response, reference, unit=1):
    CALLS.append((messages, response, reference))
    THREADS.add(threading.get_ident())
    messages.clear()
    return len(response) / unit

def first_letter(messages, a, b, reference):
    return 0.9 if a < b else 0.3

def look_up(messages, response, reference):
    return VALUES[response]

def look_up_pair(messages, a, b, reference):
    return VALUES[a, b]

def broken(messages, response, reference):
    raise KeyError("no\\nsuch")

async def slow_length(messages, response, reference):
    global ACTIVE, MOST
    ACTIVE += 1
    MOST = max(MOST, ACTIVE)
    await asyncio.sleep(0.01)
    ACTIVE -= 1
    return float(len(response))

async def slow_broken(messages, response, reference):
    if response == "bad":
        raise ValueError("not today")
    await asyncio.sleep(30)

class Callable:
    async def __call__(self, messages, response, reference):
        return 2.0

instance = Callable()
number = 7
"""
RAIN = (Message(role="user", content="Rain?"),)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module below the current folder, fresh for each test."""
    import importlib
    import sys

    name = f"own_judge_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    importlib.invalidate_caches()
    return lambda function, **fields: PythonJudge(Config(type="python", function=f"{name}:{function}", **fields))


def loaded(judge: PythonJudge) -> Any:
    import sys

    return sys.modules[judge._config.function.partition(":")[0]]


async def judged(judge: PythonJudge, *pairs: tuple[str, str], reference: str | None = None) -> list[Verdict]:
    return await judge.compare([Comparison("p", RAIN, a, b, reference=reference) for a, b in pairs])


async def test_score_with_options(module: Callable[..., PythonJudge]) -> None:
    judge = module("length", scale=0.5, options={"unit": 2})
    [verdict, other] = await judged(judge, ("abcd", "ab"), ("ab", "abcd"), reference="r")
    assert (verdict.score_a, verdict.score_b) == (2.0, 1.0)
    assert verdict.p_ab == verdict.p_ba == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-12)
    assert other.p == pytest.approx(1 - verdict.p, abs=1e-12)
    calls = loaded(judge).CALLS
    assert [(response, reference) for _, response, reference in calls] == [("abcd", "r"), ("ab", "r")]
    assert (Message(role="user", content="Rain?"),) == RAIN  # the function emptied a list of its own
    assert loaded(judge).THREADS.isdisjoint({threading.get_ident()})


async def test_plain_function_leaves_the_event_loop_free(module: Callable[..., PythonJudge]) -> None:
    judge = module("look_up")
    entered, release = threading.Event(), threading.Event()

    class Waits(dict[str, float]):
        def __missing__(self, key: str) -> float:
            entered.set()
            assert release.wait(10)
            return 1.0

    loaded(judge).VALUES = Waits()
    task = asyncio.create_task(judged(judge, ("a", "b")))
    assert await asyncio.to_thread(entered.wait, 10)
    assert not task.done()
    release.set()
    assert (await task)[0].state is VerdictState.TIE


async def test_coroutine_functions_run_at_the_same_time(module: Callable[..., PythonJudge]) -> None:
    judge = module("slow_length")
    [verdict, _] = await judged(judge, ("abc", "ab"), ("a", ""))
    assert verdict.p == pytest.approx(sigmoid(1.0))
    assert loaded(judge).MOST == 4
    [tie] = await judged(module("instance"), ("abc", "ab"))
    assert (tie.score_a, tie.state) == (2.0, VerdictState.TIE)


async def test_compare_is_asked_in_both_orders(module: Callable[..., PythonJudge]) -> None:
    [verdict, back] = await judged(module("first_letter", kind="compare"), ("a", "b"), ("b", "a"))
    assert (verdict.p_ab, verdict.p_ba) == (0.9, pytest.approx(0.7))
    assert (back.p_ab, back.p_ba) == (0.3, pytest.approx(0.1))
    assert (verdict.state, back.state) == (VerdictState.WIN, VerdictState.LOSE)
    assert (verdict.score_a, verdict.score_b) == (None, None)


@pytest.mark.parametrize(
    "value", [None, "1", math.nan, math.inf, -math.inf, 10**400, [1.0], np.float64("nan"), 1j, Decimal(1), {}]
)
async def test_a_value_that_is_no_finite_number_is_invalid(module: Callable[..., PythonJudge], value: object) -> None:
    judge, pair_judge = module("look_up"), module("look_up_pair", kind="compare")
    loaded(judge).VALUES = {"a": value, "b": 0.25, ("a", "b"): 0.75, ("b", "a"): value}
    [verdict] = await judged(judge, ("a", "b"))
    [pair] = await judged(pair_judge, ("a", "b"))
    assert verdict.state is pair.state is VerdictState.INVALID
    assert verdict.reason.startswith("response A has no finite score: judge.function returned ")
    assert pair.reason.startswith("judge.function returned ")
    assert (verdict.score_a, verdict.score_b) == (None, 0.25)


@pytest.mark.parametrize(("value", "score"), [(np.float32(0.5), 0.5), (np.int64(3), 3.0), (True, 1.0), (2, 2.0)])
async def test_any_real_number_is_a_score(module: Callable[..., PythonJudge], value: object, score: float) -> None:
    judge = module("look_up")
    loaded(judge).VALUES = {"a": value, "b": 0.0}
    [verdict] = await judged(judge, ("a", "b"))
    assert (verdict.score_a, verdict.state) == (score, VerdictState.WIN)


@pytest.mark.parametrize("value", [1.001, -0.001, 7])
async def test_a_probability_outside_its_range_is_invalid(module: Callable[..., PythonJudge], value: float) -> None:
    judge = module("look_up_pair", kind="compare")
    loaded(judge).VALUES = {("a", "b"): value, ("b", "a"): 0.5}
    [verdict, back] = await judged(judge, ("a", "b"), ("b", "a"))
    assert verdict.state is back.state is VerdictState.INVALID
    assert verdict.reason == f"judge.function returned {value}, no number in [0, 1]"


@settings(deadline=None, max_examples=50)
@given(ab=st.floats(0, 1), ba=st.floats(0, 1))
async def test_swapping_the_responses_mirrors_the_verdict(ab: float, ba: float) -> None:
    judge = PythonJudge(Config(type="python", function="builtins:len", kind="compare"))
    judge._function = lambda messages, a, b, reference: {("a", "b"): ab, ("b", "a"): ba}[a, b]
    there, back = await judged(judge, ("a", "b"), ("b", "a"))
    assert (there.p_ab, there.p_ba) == (pytest.approx(1 - back.p_ba), pytest.approx(1 - back.p_ab))
    assert there.p == pytest.approx(1 - back.p)


@pytest.mark.parametrize(
    ("function", "error", "cause"),
    [("broken", "KeyError: 'no\\nsuch'", KeyError), ("slow_broken", "ValueError: not today", ValueError)],
)
async def test_what_the_function_raises_ends_the_run(
    module: Callable[..., PythonJudge], function: str, error: str, cause: type[Exception]
) -> None:
    judge = module(function)
    start = time.monotonic()
    with pytest.raises(RLHFError) as caught:
        await judged(judge, ("fine", "bad"))
    assert str(caught.value) == f"judge.function = {judge._config.function}: raised {error}"
    assert isinstance(caught.value.__cause__, cause)
    assert time.monotonic() - start < 10  # the call that sleeps for 30 s was given up


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module_of_mine:f", "cannot import no_such_module_of_mine: ModuleNotFoundError: "),
        ("math:no_such", "math has no 'no_such'; "),
        ("math:pi", "math has no function 'pi'; "),
    ],
)
def test_function_that_cannot_be_had_is_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        PythonJudge(Config(type="python", function=name))
    assert str(caught.value).startswith(f"judge.function = {name}: {reason}")
    assert "\n" not in str(caught.value)


def test_module_that_fails_to_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unfinished_judge.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^judge\.function = unfinished_judge:f: cannot import .*: SyntaxError: "):
        PythonJudge(Config(type="python", function="unfinished_judge:f"))
