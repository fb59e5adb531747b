"""Runs of the quickstart for several seeds: scores, win rate, seconds a round, and peak memory of all its processes.

    python bench/quickstart.py [seed ...]        (default: 0 1 2; about 6 minutes each on 2 cores)

Prints a Markdown table. Memory is the proportional set size, so that a page shared by several processes counts once.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

CONFIG = "configs/quickstart.yaml"
COLUMNS = (
    "seed", "minutes", "score before", "score after", "win rate", "95 % interval", "s/round", "generate", "learn",
    "sync", "tokens/s", "peak GB",
)  # fmt: skip


class PeakMemory(threading.Thread):
    """Peak PSS of a process and everything below it, sampled once a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self._known: dict[int, psutil.Process] = {}
        self.peak = 0

    def run(self) -> None:
        """Sample until the process ends."""
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            # Engine processes outlive a parent that was replaced: once seen, a process stays in the sum.
            for process in [self._root, *self._root.children(recursive=True)]:
                self._known[process.pid] = process
            self.peak = max(self.peak, sum(map(_pss, list(self._known.values()))))
            time.sleep(1.0)


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def measure(seed: int) -> list[str]:
    """One fresh run; returns the table's row."""
    started = time.monotonic()
    name = f"bench-quickstart-{seed}"
    command = [sys.executable, "-m", "rlhf.cli", "train", CONFIG, f"name={name}", f"seed={seed}", "--fresh"]
    process = subprocess.Popen(command)
    memory = PeakMemory(process.pid)
    memory.start()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    minutes = (time.monotonic() - started) / 60
    memory.join()
    lines = Path("runs", name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    evals = [event for event in events if event["event"] == "eval"]
    rounds = [event for event in events if event["event"] == "round"]
    last = evals[-1]

    def median(key: str) -> float:
        return statistics.median(event[key] for event in rounds)

    return [
        str(seed),
        f"{minutes:.1f}",
        f"{evals[0]['eval/score']:.3f}",
        f"{last['eval/score']:.3f}",
        f"{last['eval/win_rate']:.3f}",
        f"{last['eval/win_rate_low']:.3f}-{last['eval/win_rate_high']:.3f}",
        f"{median('timing_s/total'):.1f}",
        f"{median('timing_s/generate'):.1f}",
        f"{median('timing_s/learn') + median('timing_s/reference'):.1f}",
        f"{median('timing_s/sync'):.2f}",
        f"{median('rollout/tokens_per_s'):.0f}",
        f"{memory.peak / 1e9:.1f}",
    ]


def main() -> None:
    """Run every seed and print the table."""
    seeds = [int(seed) for seed in sys.argv[1:]] or [0, 1, 2]
    rows = [measure(seed) for seed in seeds]
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + " --- |" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
