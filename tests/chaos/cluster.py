"""A Ray cluster of two nodes on this machine, with a token, and everything that it started ended by process id."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.integration.conftest import ROOT

CPUS = 3
"""Of each node: two learner ranks, two generators and a judge do not fit one node, so that both have work."""

WAIT_S = 60.0


class TwoNodes:
    """A head and a second node, which may be killed and started again; knows every process below both."""

    def __init__(self) -> None:
        # Ray's sockets: paths over 107 bytes fail.
        self.folder = Path(tempfile.mkdtemp(prefix="rlhf-c-", dir="/tmp"))
        self.address = f"127.0.0.1:{free_port()}"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            # Ray runs its workers at niceness 15 otherwise, and starts some that nobody asked for.
            "RAY_worker_niceness": "0",
            "RAY_enable_worker_prestart": "false",
            # A lost node is to be known in seconds, not after half a minute.
            "RAY_health_check_initial_delay_ms": "5000",
            "RAY_health_check_period_ms": "2000",
            "RAY_health_check_timeout_ms": "4000",
            "RAY_health_check_failure_threshold": "3",
        }
        self.seen: dict[int, psutil.Process] = {}
        """Every process that was ever below a node or another root, by its id."""
        self._roots: list[psutil.Process] = []
        self._commands: list[subprocess.Popen[Any]] = []
        self._asking: subprocess.Popen[str]

    def __enter__(self) -> Self:
        try:
            port = self.address.partition(":")[2]
            self._head = self._start_node(
                "--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false",
                f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}",
            )  # fmt: skip
            until = time.monotonic() + WAIT_S
            while not listens(int(port)):
                if self._head.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the head did not start:\n{(self.folder / 'node-1.log').read_text()[-3000:]}")
                time.sleep(0.1)
            self.start_second()
            self._asking = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.named_actors", self.address],
                env=self.environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            self._commands.append(self._asking)
            self.track(self._asking.pid)
            assert self._asking.stdout is not None
            self._asking.stdout.readline()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.look()
        for process in self.seen.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self._commands:
            process.wait()
        psutil.wait_procs(list(self.seen.values()), timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_second(self) -> None:
        """Start the second node, for the first time or in place of one that is gone."""
        self._second = self._start_node(f"--address={self.address}")

    def keep_second(self) -> None:
        """Start the second node again if it ended by itself: Ray gives up after 30 s on a machine that is too busy."""
        if self._second.poll() is not None:
            self.start_second()

    def reap_second(self) -> None:
        """Wait for the command that held the second node, which ends once its raylet is gone."""
        self._second.wait(WAIT_S)

    def actors(self) -> dict[str, int]:
        """Process id of each named actor that is ready, of the run that began last."""
        assert self._asking.stdin is not None
        assert self._asking.stdout is not None
        self._asking.stdin.write("\n")
        self._asking.stdin.flush()
        return json.loads(self._asking.stdout.readline())

    def raylet(self) -> psutil.Process | None:
        """The second node's raylet, if it runs."""
        return next((p for p in below(self._second.pid) if _name(p) == "raylet"), None)

    def second_node(self) -> list[psutil.Process]:
        """Everything of the second node, the raylet's workers and their engines included."""
        return below(self._second.pid)

    def track(self, pid: int) -> None:
        """Take a process that somebody else started among those that are looked after."""
        with suppress(psutil.NoSuchProcess):
            self._roots.append(psutil.Process(pid))
            self.look()

    def look(self) -> None:
        """Learn of processes that have been started since; orphans can be found no more."""
        self._roots = [root for root in self._roots if root.is_running()]
        for root in self._roots:
            for process in [root, *below(root.pid)]:
                self.seen.setdefault(process.pid, process)
        self.seen = {pid: process for pid, process in self.seen.items() if process.is_running()}

    def alive(self, seconds: float) -> list[str]:
        """Command lines of processes that are neither a node's nor below a root, and do not end within `seconds`."""
        self.look()
        ours = {process.pid for root in self._roots for process in [root, *below(root.pid)]}
        strays = [process for pid, process in self.seen.items() if pid not in ours]
        _, left = psutil.wait_procs(strays, timeout=seconds)
        return [line for process in left if (line := _command(process))]

    def _start_node(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats",
            f"--num-cpus={CPUS}", "--object-store-memory=268435456", "--node-ip-address=127.0.0.1",
            "--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}",
            "--include-log-monitor=false", "--no-monitor", *arguments,
        ]  # fmt: skip
        with (self.folder / f"node-{len(self._commands) + 1}.log").open("w") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._commands.append(process)
        self.track(process.pid)
        return process


def below(pid: int) -> list[psutil.Process]:
    """The descendants of a process; none if it is gone."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _command(process: psutil.Process) -> str:
    """Its command line; empty if it is gone, or a zombie because nobody reaps orphans here."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
