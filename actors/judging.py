"""A judge on its own, for the `rlhf judge` commands."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rich.console import Console

from actors.cluster import connect
from actors.judge_launch import JudgeLauncher
from actors.node_needs import judge_checks
from actors.session import stop_on_sigterm
from rlhf.config import JudgeRun
from rlhf.inputs import check_judges
from rlhf.ports import Judge

T = TypeVar("T")

OBJECT_STORE = 256 << 20
"""Comparisons and verdicts are small; Ray's own default would take a third of the memory."""


def run_with_judge(
    config: JudgeRun, work: Callable[[Judge], Awaitable[T]], then: str = "the same command starts over"
) -> T:
    """Start the judge's actors, run `work` with it, and stop them; notes for the user go to stderr.

    Raises `actors.session.Stopped`, whose message ends with `then`, on SIGTERM.
    """
    check_judges({"judge": config.judge})
    console = Console(stderr=True)

    async def run() -> T:
        with connect(config.name, config.cluster, OBJECT_STORE) as cluster, stop_on_sigterm(then):
            launcher = JudgeLauncher(cluster, config.cluster, config.seed, None, console.print)
            with console.status("loading the judge"):
                if not cluster.private:
                    await judge_checks(config, launcher, console.print).check_nodes()
                judge = await launcher.start(config.judge, "judge", lambda: None)
            return await work(judge)

    return asyncio.run(run())
