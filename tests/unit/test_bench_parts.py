"""The pure parts of bench/: lines through measurements, clocks, and what the idle table is computed from."""

import asyncio
import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BENCH = Path(__file__).parents[2] / "bench"


def load(name: str) -> ModuleType:
    """A file of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


regression, stopwatch = load("_regression"), load("_stopwatch")


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (60, 2.0003)])
def test_t_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert regression.t_quantile(freedom) == pytest.approx(expected, abs=0.01)


@settings(max_examples=50)
@given(ys=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=40))
def test_a_slope_and_its_error_are_those_of_least_squares(ys: list[float]) -> None:
    xs = np.arange(len(ys), dtype=float) * 2 + 5
    design = np.stack([np.ones_like(xs), xs], axis=1)
    solution, *_ = np.linalg.lstsq(design, np.array(ys), rcond=None)
    variance = np.sum((design @ solution - ys) ** 2) / (len(ys) - 2)
    error = math.sqrt(variance * np.linalg.inv(design.T @ design)[1, 1])
    found = regression.slope(list(xs), ys)
    reach = regression.t_quantile(len(ys) - 2) * error
    assert (found.value, found.low, found.high) == pytest.approx(
        (solution[1], solution[1] - reach, solution[1] + reach), abs=1e-6
    )


def test_growth_is_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    rounds = list(range(200))
    noise = rng.normal(0, 5, 200)
    assert not regression.slope(rounds, list(noise), block=8).grows
    grown = regression.slope(rounds, list(noise + 0.1 * np.arange(200)), block=8)
    assert grown.grows
    assert grown.low < 0.1 < grown.high


def test_blocks_leave_out_a_rest_at_the_start() -> None:
    # The first two are wild: a block of three would take them in.
    found = regression.slope(range(11), [1e6, -1e6, *range(2, 11)], block=3)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="needs three"):
        regression.slope(range(8), range(8), block=4)


def test_sparklines_run_from_least_to_most() -> None:
    assert regression.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert regression.sparkline([5.0] * 3) == "▁▁▁"
    assert len(regression.sparkline(list(range(200)), width=50)) == 50


def test_a_stopwatch_clocks_calls_coroutines_and_iterators() -> None:
    class Worker:
        def call(self) -> int:
            time.sleep(0.02)
            return 1

        def spin(self) -> None:
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass

        async def wait(self) -> int:
            await asyncio.sleep(0.02)
            return 2

        def items(self) -> Iterator[int]:
            for n in range(2):
                time.sleep(0.02)
                yield n

    watch, worker = stopwatch.Stopwatch(), Worker()
    for name in ("call", "spin", "wait", "items"):
        watch.wrap(worker, name, name)
    assert (worker.call(), worker.call(), asyncio.run(worker.wait())) == (1, 1, 2)
    found = []
    for item in worker.items():
        time.sleep(0.1)  # the consumer's own time
        found.append(item)
    assert found == [0, 1]
    assert {name: len(calls) for name, calls in watch.seconds.items()} == {"call": 2, "wait": 1, "items": 1}
    thread = Thread(target=worker.spin)
    thread.start()
    thread.join()
    lap = watch.lap()
    assert lap["call"] >= 0.04
    assert lap["wait"] >= 0.02
    assert 0.04 <= lap["items"] < 0.2
    assert watch.lap() == {}
    seconds, processor, own = watch.totals()
    assert seconds >= 0.06
    assert 0.02 <= processor < 0.05, "a sleep takes no processor"
    assert own < 0.01, "another thread's is not this one's"
    with pytest.raises(AttributeError):
        watch.wrap(worker, "missing", "missing")


def test_idle_time_is_what_lies_between_trainings() -> None:
    load("_standins")
    overlap = load("overlap")
    assert overlap.idle_share([(10.0, 12.0), (13.0, 15.0), (15.0, 18.0)]) == pytest.approx(1 / 6)
    assert overlap.least_idle(1.0, 3.0, lookahead=0) == pytest.approx(0.25)
    assert overlap.least_idle(1.0, 3.0, lookahead=1) == 0.0
    assert overlap.least_idle(4.0, 3.0, lookahead=1) == pytest.approx(0.25)
    assert overlap.growth([(100, 0.3), (1100, 1.3), (600, 9.0)]) == pytest.approx((0.2, 0.001))
