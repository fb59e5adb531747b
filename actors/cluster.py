"""Joining or starting Ray, and what the nodes offer."""

import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray

from actors.tokens import read_token, refusal
from rlhf.config.system import Cluster
from rlhf.errors import InputError, RLHFError
from rlhf.rounds.run_directory import cores

LOCAL_CPUS = 64
"""CPUs that a private local Ray announces: its actors take turns on the real cores, none may be refused for them."""

END_S = 5.0
"""Seconds that a private Ray's workers have to end once their node has."""

WHO = "/ray.rpc.NodeInfoGcsService/GetClusterId"
ANSWER_S = 6.0
"""A question to the head that takes no arguments, and the seconds in which it has to answer."""


@dataclass(frozen=True)
class ClusterInfo:
    """The cluster of a run: its namespace, the kind of device, and whether it is private to this process."""

    namespace: str
    device: str
    private: bool

    def threads(self, asked: int | None, share: int = 1) -> int:
        """Threads of an actor: as asked, else the local machine's cores shared among `share` actors, else 4."""
        if asked is not None:
            return asked
        return max(1, cores() // share) if self.private and self.device == "cpu" else 4

    def reserved(self, threads: int) -> int:
        """CPUs that an actor reserves: on a private Ray the actors take turns on the same cores."""
        return 1 if self.private else threads


@contextmanager
def connect(name: str, cluster: Cluster, object_store_bytes: int, run_dir: Path | None = None) -> Iterator[ClusterInfo]:
    """Start a private Ray or join a running one; the private one is shut down at the end.

    `run_dir` remembers the private one's temporary folder, so that a process that was killed leaves none for long.

    Raises `RLHFError` if there is no cluster at the address, or one of other versions, `InputError` if it does not take
    this process's token.
    """
    namespace = f"rlhf-{name}-{uuid.uuid4().hex[:8]}"
    private = cluster.address == "local"
    quiet: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    temp_dir = _fresh_temp_dir(cluster, run_dir) if private else None
    try:
        if private:
            # Ray runs its workers at niceness 15, which starves them beside anything else on a shared machine.
            os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(
                num_cpus=LOCAL_CPUS,
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                _temp_dir=temp_dir,
                **quiet,
            )
        else:
            _check_head(cluster.address)
            ray.init(address=cluster.address, **quiet)
    except ConnectionError as error:
        raise RLHFError(f"cluster.address = {cluster.address!r}: no Ray cluster there ({error})") from error
    except ray.exceptions.AuthenticationError as error:
        raise InputError(f"cluster.address = {cluster.address!r}: {refusal(None)}") from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise InputError(
            f"cluster.address = {cluster.address!r}: {' '.join(str(error).split())}; use the cluster's versions here"
        ) from error
    try:
        yield ClusterInfo(namespace, _device(cluster), private)
    finally:
        workers = _workers() if private else []
        try:
            ray.shutdown()
        finally:
            _end(workers)
            if temp_dir is not None:
                shutil.rmtree(temp_dir, ignore_errors=True)


def _workers() -> list[psutil.Process]:
    """The processes that the private Ray's node has started, and those that these have."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if child.name() == "raylet":
                found += child.children(recursive=True)
    return found


def _end(workers: list[psutil.Process]) -> None:
    """Wait for what ends by itself, and kill the rest: a worker has been seen to wait for ever for a lock of Ray's own
    exit, with all its memory, after its node had gone."""
    _wait(workers)
    left = list(filter(_lives, workers))
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _wait(left)


def _wait(processes: list[psutil.Process]) -> None:
    """Until all have ended, `END_S` seconds at most."""
    deadline = time.monotonic() + END_S
    while any(map(_lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    """Whether it has not ended; one whose parent has not asked how it ended has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _check_head(address: str) -> None:
    """Ask the head at host:port who it is. Ray itself would try for half a minute and say little.

    Raises `RLHFError` within seconds if no head answers there, `InputError` if it does not take the token.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise RLHFError(
            f"cluster.address = {address!r}: nothing answers there ({error.strerror or error}); "
            "start the cluster's head first, or use local"
        ) from None
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # Ray's own certificates are its business.
    token = read_token()
    metadata = [("authorization", f"Bearer {token.text}")] if token else []
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(WHO)(b"", timeout=ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise InputError(f"cluster.address = {address!r}: {refusal(token.source if token else None)}") from None
            raise RLHFError(
                f"cluster.address = {address!r}: no Ray head answers there ({error.code().name.lower()}); give the "
                "address of its GCS, whose port is 6379 by default"
            ) from None


def _fresh_temp_dir(cluster: Cluster, run_dir: Path | None) -> str:
    """A new folder for Ray's sockets and logs. It is noted in the run directory, so that the folder of a process that
    was killed is removed by the next one."""
    if run_dir is None:
        return tempfile.mkdtemp(prefix="rlhf-", dir=cluster.temp_dir)
    note = run_dir / ".ray"
    if note.exists():
        left_over = Path(note.read_text(encoding="utf-8").strip())
        if left_over.name.startswith("rlhf-"):
            shutil.rmtree(left_over, ignore_errors=True)
    path = tempfile.mkdtemp(prefix="rlhf-", dir=cluster.temp_dir)
    note.write_text(path + "\n", encoding="utf-8")
    return path


def _device(cluster: Cluster) -> str:
    gpus = ray.cluster_resources().get("GPU", 0)
    if cluster.device == "cuda" and not gpus:
        raise RLHFError("cluster.device = 'cuda': no node of the cluster has a GPU; use auto or cpu")
    if cluster.device == "auto":
        return "cuda" if gpus else "cpu"
    return cluster.device
