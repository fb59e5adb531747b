"""Seconds to train the sealed pairs of a round: prefix-shared against padded rows, alternating, in one process.

    python bench/learner.py [RUN_DIR] [round] [repeats]

RUN_DIR is any run directory with sealed pairs, runs/quickstart by default. The reference is included.
"""

import json
import os
import socket
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from rlhf.config.load import read_yaml, validate
from rlhf.learning.mask_probe import Layout
from rlhf.learning.rank import RankLearner
from rlhf.rounds.sealing import read_sealed


def main() -> None:
    """Measure both layouts and print their medians and the ratio."""
    arguments = sys.argv[1:]
    run_dir = Path(arguments[0] if arguments else "runs/quickstart")
    number, repeats = (int(value) for value in (*arguments[1:], *("1", "3")[max(0, len(arguments) - 1) :]))
    if not (run_dir / "rounds").exists():
        raise SystemExit(f"{run_dir}: no run with sealed pairs there; `make quickstart` makes one")
    document = read_yaml(run_dir / "config.yaml")
    document.pop("versions", None)
    document.pop("history", None)
    folder = run_dir / "rounds" / f"{number:04d}"
    digest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["pairs"]["sha256"]
    sealed = read_sealed(folder / "pairs.parquet", number, digest)
    learner = RankLearner(validate(document, str(run_dir)), 0, 1, "cpu")
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    learner.start("127.0.0.1", port, 60.0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats + 1):
        for shared in (True, False):
            learner.setup = replace(learner.setup, layout=Layout(prefix_sharing=shared))
            learner._steps.setup = learner.setup
            started = time.perf_counter()
            learner.train(replace(sealed, round=learner.rounds_done + 1))
            seconds[shared].append(time.perf_counter() - started)
    for shared, name in ((True, "prefix-shared"), (False, "padded")):
        # The first pass of each warms up.
        times = seconds[shared][1:]
        print(f"{name:14s} {statistics.median(times):6.2f} s  ({min(times):.2f}-{max(times):.2f})")
    ratio = statistics.median(seconds[False][1:]) / statistics.median(seconds[True][1:])
    print(f"padded / shared {ratio:5.2f}   {len(sealed.pairs)} pairs, {learner.statistics()['perf/mfu']:.0%} MFU")


if __name__ == "__main__":
    main()
