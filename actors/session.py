"""What surrounds every long command: its run directory, its monitor, how it is stopped, and its one error."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import RLHFError
from rlhf.files import rename_durable, writing
from rlhf.monitor.group import MonitorGroup, build_monitor
from rlhf.monitor.monitored import Monitored
from rlhf.monitor.report import write_report
from rlhf.ports import Learner
from rlhf.rounds.run_directory import open_run_directory


class Stopped(RLHFError):
    """The run was stopped by SIGTERM after a clean save."""

    exit_code = 143


def run_session(
    config: Monitored,
    fresh: bool,
    rounds: int,
    notes: Sequence[str],
    main: Callable[[Path, MonitorGroup], Coroutine[Any, Any, None]],
) -> None:
    """Run `main` in the config's run directory to its end, then write the report.

    Raises `RLHFError` (its `exit_code` is the command's), `KeyboardInterrupt` on SIGINT; both after a clean save.
    """
    told: list[str] = []
    with open_run_directory(config, fresh, told.append) as run_dir, writing(run_dir):
        monitor = build_monitor(config, run_dir, rounds)
        code = 1

        try:
            for note in [*told, *notes]:
                monitor.alert(note)
            with _one_error():
                asyncio.run(main(run_dir, monitor))
            code = 0
        finally:
            monitor.close(code)
        print(f"report: {write_report(run_dir)}")


async def export_policy(learner: Learner, run_dir: Path, monitor: MonitorGroup) -> None:
    """The final policy as a Hugging Face checkpoint, whole or not at all."""
    staging = run_dir / "policy.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    with monitor.progress("save policy", None):
        await learner.export(staging)
    shutil.rmtree(run_dir / "policy", ignore_errors=True)
    rename_durable(staging, run_dir / "policy")


@contextmanager
def stop_on_sigterm(then: str = "the same command goes on from the last saved round") -> Iterator[None]:
    """SIGTERM cancels the run, which ends after the save under way; a second one ends the process at once.

    `then` ends the message: how to go on. Enter it once Ray has been started: Ray puts a handler of its own in place.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if stopped:
            os._exit(Stopped.exit_code)
        stopped = True
        assert task is not None
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        yield
    except asyncio.CancelledError:
        if not stopped:
            raise
        raise Stopped(f"stopped by SIGTERM; {then}") from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@contextmanager
def _one_error() -> Iterator[None]:
    """Tasks fail in groups; a user gets the one error that is ours or the disk's, anything else with its traceback."""
    try:
        yield
    except BaseExceptionGroup as group:
        ours = group.subgroup(RLHFError) or group.subgroup(OSError)
        if ours is None:
            raise
        error: BaseException = ours
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from group
