"""Starts the ranks of a learner test as processes, without Ray."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(script, folder, world_size, timeout=240):
    """Run `script FOLDER RANK WORLD_SIZE PORT` for every rank; fails with the output of a rank that does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), str(world_size), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]
