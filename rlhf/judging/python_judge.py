"""The user's own function as a judge."""

import asyncio
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

from rlhf.config.judge import PythonJudge as PythonConfig
from rlhf.data.rows import one_line
from rlhf.errors import InputError, RLHFError
from rlhf.judging.pointwise import Answer, Score, bradley_terry, compare_by_score
from rlhf.judging.verdicts import invalid_verdict, make_verdict
from rlhf.records import Comparison, Message, Verdict

Arguments = tuple[Any, ...]


class PythonJudge:
    """Calls `module:function`: a plain function in one thread, call after call; a coroutine function concurrently.

    kind "score": f(messages, response, reference, **options) is a response's score. kind "compare":
    f(messages, a, b, reference, **options) is p(A wins), asked in both orders. `messages` is a list of dicts.
    """

    def __init__(self, config: PythonConfig) -> None:
        """Raises `InputError` naming `judge.function` if it cannot be imported or is not callable."""
        self._config = config
        self._function = load_function(config.function)
        self._asynchronous = _is_asynchronous(self._function)
        # One thread: the function need not be thread-safe, and the event loop stays free.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge-function")
        self._probability = bradley_terry(config.scale)

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; a value that is no number, or no probability, makes it INVALID.

        Raises `RLHFError` if the function raises.
        """
        if self._config.kind == "score":
            return await compare_by_score(comparisons, self._scores, self._probability)
        calls = [
            (_plain(comparison.messages), first, second, comparison.reference)
            for comparison in comparisons
            for first, second in ((comparison.a, comparison.b), (comparison.b, comparison.a))
        ]
        values = await self._values(calls)
        return [
            _verdict(comparison, ab, ba)
            for comparison, ab, ba in zip(comparisons, values[::2], values[1::2], strict=True)
        ]

    async def _scores(self, answers: Sequence[Answer]) -> list[Score]:
        calls = [(_plain(answer.messages), answer.response, answer.reference) for answer in answers]
        return [_score(value) for value in await self._values(calls)]

    async def _values(self, calls: Sequence[Arguments]) -> list[Any]:
        if not self._asynchronous:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, lambda: [self._call(arguments) for arguments in calls])
        tasks = [asyncio.create_task(self._await(arguments)) for arguments in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _call(self, arguments: Arguments) -> Any:
        try:
            return self._function(*arguments, **self._config.options)
        except Exception as error:
            raise self._raised(error) from error

    async def _await(self, arguments: Arguments) -> Any:
        try:
            return await self._function(*arguments, **self._config.options)
        except Exception as error:
            raise self._raised(error) from error

    def _raised(self, error: Exception) -> RLHFError:
        return RLHFError(f"judge.function = {self._config.function}: raised {type(error).__name__}: {one_line(error)}")


def load_function(name: str) -> Callable[..., Any]:
    """The function of a `module:function` name; modules below the current folder can be imported too.

    Raises `InputError` if it cannot be imported or is not callable.
    """
    module_name, _, attribute = name.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise InputError(
            f"judge.function = {name}: cannot import {module_name}: {type(error).__name__}: {one_line(error)}; it has "
            "to be importable on every node"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        wrong = "has no" if function is None else "has no function"
        raise InputError(f"judge.function = {name}: {module_name} {wrong} {attribute!r}; name a function of the module")
    found: Callable[..., Any] = function
    return found


def _is_asynchronous(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [dict(message) for message in messages]


def _number(value: Any) -> float:
    """The value as a float; NaN where it is no finite number."""
    try:
        return float(value) if isinstance(value, Real) and math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _score(value: Any) -> Score:
    number = _number(value)
    if math.isnan(number):
        return Score(None, f"has no finite score: judge.function returned {_shown(value)}")
    return Score(number)


def _verdict(comparison: Comparison, ab: Any, ba: Any) -> Verdict:
    for value in (ab, ba):
        if not 0.0 <= _number(value) <= 1.0:  # also where it is NaN
            return invalid_verdict(comparison, f"judge.function returned {_shown(value)}, no number in [0, 1]")
    return make_verdict(comparison, _number(ab), 1.0 - _number(ba))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
