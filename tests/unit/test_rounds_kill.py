"""A run is killed at every point it passes, then started again: every planned prompt is trained exactly once.

The kill is the end of a real process, in the middle of whatever it does: no handler runs, nothing is flushed. One
child process loads the code once, then forks a process for each kill and each second try (run this file to see it).
"""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

KILLED = 77
RENAMES = [
    f"{side} rename {name}"
    for name in ("manifest.json", "rollouts.parquet", "pairs.parquet", "round-0001", "round-0002")
    for side in ("before", "after")
]
"""Killed at by name too: with a thread that writes, the same number is not the same point in every run."""


@pytest.mark.parametrize(
    ("count", "lookahead", "every", "stride", "kills"),
    [
        (2, 0, 1, 1, 1),
        (3, 1, 2, 5, 1),
        # Killed again and again, each process a little later than the one before it.
        (3, 1, 1, 20, 3),
    ],
)
def test_killed_anywhere_every_prompt_is_trained_exactly_once(
    count: int, lookahead: int, every: int, stride: int, kills: int, tmp_path: Path
) -> None:
    numbers = (count, lookahead, every, stride, kills)
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path), *map(str, numbers)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout)
    assert report["failed"] == {}
    killed_at = report["killed_at"]
    assert len(killed_at) >= 60 // stride
    if stride == 1:
        # The points are of every kind: all ports, and both sides of each rename.
        assert set(RENAMES) <= set(killed_at)
        kinds = {event.split()[0] for event in killed_at}
        assert kinds >= {"sample", "response", "judge", "train", "step", "export", "publish", "serve", "save"}


def _forked(work: Callable[[], None]) -> int:
    """Do `work` in a forked process; returns its exit code: 0, KILLED, or 1 after a traceback."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a hang is a failure with a place, not a test that never ends
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(ports: Any, run_dir: Path, config: Any, kill_at: int | str | None) -> None:
    """A run, ended at point number `kill_at` or the first of that name, which is written beside the run directory."""
    points = itertools.count()

    def at(event: str) -> None:
        if kill_at in (next(points), event):
            (run_dir.parent / "killed_at").write_text(event)
            os._exit(KILLED)

    _watch_files(at)
    asyncio.run(ports.run(ports.World(at), config, run_dir))


def _finish(ports: Any, run_dir: Path, config: Any, whole: Path, count: int) -> None:
    """The last try ends, and its end is that of a run that nobody killed."""
    os.fsync = lambda fd: None
    try:
        asyncio.run(ports.run(ports.World(), config, run_dir))
        assert ports.check_finished(run_dir, count) == ports.check_finished(whole, count), "other pairs were trained"
    except BaseException as error:
        (run_dir.parent / "problem").write_text(f"{type(error).__name__}: {error}"[:300])


def _watch_files(at: Any) -> None:
    """Make both sides of each rename a point. Flushes do nothing: the death of a process loses no written page."""
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        at(f"before rename {target.name}")
        result = rename(self, target)
        at(f"after rename {target.name}")
        return result

    os.fsync = lambda fd: None
    Path.rename = watched  # type: ignore[method-assign,assignment]


def main(folder: Path, count: int, lookahead: int, every: int, stride: int, kills: int) -> dict[str, Any]:
    """Kill at point 0, stride, ... until a run ends before it is killed; returns where, and what went wrong.

    Only children read or write Arrow files: it starts threads, and a process with threads cannot be forked safely.
    """
    # What Arrow imports at its first table: once here, not in every child.
    import pandas  # noqa: F401
    import pyarrow.dataset  # noqa: F401
    import rounds_world as ports

    config = ports.make_config(rounds__count=count, rounds__lookahead=lookahead, checkpoint__every=every)
    whole = folder / "whole" / "r"
    assert _forked(lambda: _run(ports, whole, config, None)) == 0
    killed_at: list[str] = []
    failed: dict[str, str] = {}
    for first in [*(RENAMES if stride == 1 else ()), *range(0, 10_000, stride)]:
        run_dir = folder / str(first) / "r"
        run_dir.parent.mkdir()
        points = [first] if isinstance(first, str) else [first + 5 * again for again in range(kills)]
        codes = [_forked(partial(_run, ports, run_dir, config, point)) for point in points]
        if codes[0] != KILLED:
            assert codes[0] == 0, f"the run ended with {codes[0]}"
            return {"killed_at": killed_at, "failed": failed}
        killed_at.append((run_dir.parent / "killed_at").read_text())
        code = _forked(partial(_finish, ports, run_dir, config, whole, count))
        problem = run_dir.parent / "problem"
        if code or problem.exists():
            failed[f"{first}: {killed_at[-1]}"] = problem.read_text() if problem.exists() else f"exit code {code}"
    raise AssertionError("unreachable")


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
