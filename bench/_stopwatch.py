"""Seconds of single calls inside code that runs unchanged: functions are wrapped where they are looked up."""

import functools
import inspect
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any


class Stopwatch:
    """Lists of seconds by label, one entry a call; a coroutine counts until it has ended, an iterator until it is
    empty, without what its consumer does in between."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._total = self._processor = self._own = 0.0
        self._thread = threading.get_ident()

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Time every call of `owner.name` from now on; raises `AttributeError` if there is none."""
        setattr(owner, name, self.timed(getattr(owner, name), label))

    def timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """The function with its calls timed under `label`."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            started, worked = time.perf_counter(), time.thread_time()
            result = function(*arguments, **named)
            if inspect.iscoroutine(result):
                return self._awaited(result, label, started)
            if inspect.isgenerator(result):
                return self._iterated(result, label)
            self.seconds[label].append(time.perf_counter() - started)
            self._total += self.seconds[label][-1]
            worked = time.thread_time() - worked
            self._processor += worked
            self._own += worked if threading.get_ident() == self._thread else 0.0
            return result

        return call

    def totals(self) -> tuple[float, float, float]:
        """Seconds, seconds of the calling threads' processor, and those of the thread that this was made in, of all
        plain calls so far."""
        return self._total, self._processor, self._own

    def lap(self) -> dict[str, float]:
        """Sums by label since the last lap."""
        found = {label: sum(calls) for label, calls in self.seconds.items()}
        self.seconds.clear()
        return found

    async def _awaited(self, coroutine: Any, label: str, started: float) -> Any:
        try:
            return await coroutine
        finally:
            self.seconds[label].append(time.perf_counter() - started)

    def _iterated(self, items: Iterator[Any], label: str) -> Iterator[Any]:
        total = 0.0
        while True:
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                self.seconds[label].append(total + time.perf_counter() - started)
                return
            total += time.perf_counter() - started
            yield item
