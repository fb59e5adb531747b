"""Peak memory of every role of a whole run against the estimate of `rlhf validate`.

    python bench/memory_run.py CONFIG [key.path=value ...]

Trains the config afresh on this machine, in one private Ray. The estimate is for prompts and responses of the longest
length, so give it such: `prompts.max_tokens` that the prompts reach, `generator.sampling.max_tokens` with
`generator.engine={...}` as they come. Figures are proportional set sizes, twice a second: anonymous memory and files by
role, shared memory (Ray's object store, whoever maps it) in a row of its own.
"""

import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress

import psutil

from rlhf.config import RunConfig, load_run
from rlhf.planning import make_plan

ROLES = {"GeneratorActor": "generator", "JudgeActor": "judge", "LearnerActor": "learner"}
STORE, OTHERS = "object store", "driver and Ray"


class Peaks(threading.Thread):
    """The largest memory of each role of a process tree, and of all of it at one time; GB."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.peaks: dict[str, float] = defaultdict(float)

    def run(self) -> None:
        """Sample until the process ends."""
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            now: dict[str, float] = defaultdict(float)
            for process in [self._root, *self._root.children(recursive=True)]:
                with suppress(psutil.Error, OSError):
                    own, shared = memory(process.pid)
                    now[role(process)] += own
                    now[STORE] += shared
            for name, size in [*now.items(), ("all", sum(now.values()))]:
                self.peaks[name] = max(self.peaks[name], size)
            time.sleep(0.5)


def memory(pid: int) -> tuple[float, float]:
    """Proportional set size of a process: anonymous memory and files, shared memory; GB."""
    sizes: dict[str, float] = defaultdict(float)
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
        for line in file:
            if line.startswith("Pss_"):
                key, value, _ = line.split()
                sizes[key] = int(value) * 1024 / 1e9
    return sizes["Pss_Anon:"] + sizes["Pss_File:"], sizes["Pss_Shmem:"]


def role(process: psutil.Process) -> str:
    """By the titles that Ray gives its actors; an engine's process belongs to the actor above it."""
    for each in [process, *process.parents()]:
        title = " ".join(each.cmdline())
        for actor, name in ROLES.items():
            if title.startswith("ray::") and actor in title:
                return name
    return OTHERS


def main() -> None:
    """Run it and print both figures of each role."""
    arguments = sys.argv[1:]
    config = load_run(arguments[0], arguments[1:])
    if not isinstance(config, RunConfig):
        raise SystemExit(f"{arguments[0]}: expected an online run, which has prompts")
    process = subprocess.Popen([sys.executable, "-m", "rlhf.cli", "train", *arguments, "--fresh"])
    peaks = Peaks(process.pid)
    peaks.start()
    if code := process.wait():
        raise SystemExit(f"the run failed with {code}")
    peaks.join()
    plan = make_plan(config)
    estimates = {role.name: role.actors * role.total / 1e9 for role in plan.roles} | {STORE: plan.object_store / 1e9}
    print("| role | measured, GB | estimate, GB | estimate / measured |\n| --- | --- | --- | --- |")
    for name, measured in peaks.peaks.items():
        estimate = plan.total / 1e9 if name == "all" else estimates.get(name)
        shown = (f"{estimate:.2f}", f"{estimate / measured:.2f}") if estimate else ("", "")
        print(f"| {name} | {measured:.2f} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
