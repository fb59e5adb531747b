"""A Ray cluster of real `ray start` nodes on this machine, with a token; all of it is ended by process id."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import requests

from tests.integration.conftest import ROOT

WAIT_S = 60
QUICK_LOSS = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}
"""Variables of nodes: one that is lost is known in seconds, not after half a minute."""

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class RayNodes:
    """A head with its dashboard and as many other nodes as are started, and what a client of it needs.

    `exported` are variables that the nodes have and clients do not.
    """

    home: Path
    exported: dict[str, str] = field(default_factory=dict)
    options: Sequence[str] = ("--num-cpus=16",)
    """Of the head."""

    def __post_init__(self) -> None:
        # Ray's sockets: paths over 107 bytes fail.
        self.temp = Path(tempfile.mkdtemp(prefix="rlhf-", dir="/tmp"))
        dashboard, gcs = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.gcs = f"127.0.0.1:{gcs}"
        """For `ray.init`."""
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        head = self.start_node(
            "--head", f"--port={self.gcs.partition(':')[2]}", f"--dashboard-port={self.address.rpartition(':')[2]}",
            "--dashboard-host=127.0.0.1", *self.options,
        )  # fmt: skip
        try:
            until = time.monotonic() + WAIT_S
            while not _answers(self.address):
                if head.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the head did not start:\n{(self.temp / 'node-0.log').read_text()[-3000:]}")
                time.sleep(0.2)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self.processes):
            end(process)
        shutil.rmtree(self.temp, ignore_errors=True)

    def join(self, *options: str, before: Sequence[str] = (), **exported: str) -> subprocess.Popen[bytes]:
        """Start another node, with variables of its own; `before` is a command that runs `ray start`."""
        return self.start_node(f"--address={self.gcs}", *options, before=before, **exported)

    def start_node(self, *options: str, before: Sequence[str] = (), **exported: str) -> subprocess.Popen[bytes]:
        """`ray start --block` in a process group of its own, with a folder of its own.

        Every node unpacks a job's files anew, in the middle of the work of others that have the same folder.
        """
        number = len(self.processes)
        command = [
            *before, str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--object-store-memory=268435456",
            "--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0",
            f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={self.temp / str(number)}", *options,
        ]  # fmt: skip
        ray = {
            # Ray runs its workers at niceness 15 otherwise, and starts some that nobody asked for.
            "RAY_worker_niceness": "0",
            "RAY_enable_worker_prestart": "false",
        }
        with (self.temp / f"node-{number}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                env=self.environment | ray | self.exported | exported,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def submit(
        self, *arguments: str, timeout: float = 60, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run `rlhf submit` to its end, with some variables changed, or taken away where they are None."""
        changed = self.environment | {name: value for name, value in environment.items() if value is not None}
        for name, value in environment.items():
            if value is None:
                changed.pop(name, None)
        return subprocess.run(
            submission(*arguments),
            env=changed,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def submission(*arguments: str) -> list[str]:
    """The command `rlhf submit`."""
    return [sys.executable, "-m", "rlhf.cli", "submit", *arguments]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a node and what descends from it, and nothing else; `ray stop` would end every Ray of this machine."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid)
        everything = [below, *below.children(recursive=True)]
        for one in everything:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        psutil.wait_procs(everything, timeout=10)


def _answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/api/version", timeout=1).status_code in (200, 401)
    except requests.RequestException:
        return False
