"""Joining or starting Ray, and what the nodes offer."""

import logging
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlhf.config import RunConfig
from rlhf.errors import RLHFError

LOCAL_CPUS = 64
"""CPUs that a private local Ray announces: its actors take turns on the real cores, none may be refused for them."""


@dataclass(frozen=True)
class ClusterInfo:
    """The cluster of a run: its namespace, the kind of device, and whether it is private to this process."""

    namespace: str
    device: str
    private: bool


@contextmanager
def connect(config: RunConfig, run_dir: Path, object_store_bytes: int) -> Iterator[ClusterInfo]:
    """Start a private Ray or join a running one; the private one is shut down at the end.

    Raises `RLHFError` if there is no cluster at the address.
    """
    namespace = f"rlhf-{config.name}-{uuid.uuid4().hex[:8]}"
    private = config.cluster.address == "local"
    quiet: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    temp_dir = _fresh_temp_dir(config, run_dir) if private else None
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
            _check_reachable(config.cluster.address)
            ray.init(address=config.cluster.address, **quiet)
    except ConnectionError as error:
        raise RLHFError(f"cluster.address = {config.cluster.address!r}: no Ray cluster there ({error})") from error
    try:
        yield ClusterInfo(namespace, _device(config), private)
    finally:
        ray.shutdown()
        if temp_dir is not None:
            shutil.rmtree(temp_dir, ignore_errors=True)


def _check_reachable(address: str) -> None:
    """Raise `RLHFError` within seconds if nothing listens at host:port; Ray itself would try for minutes."""
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


def _fresh_temp_dir(config: RunConfig, run_dir: Path) -> str:
    """A new folder for Ray's sockets and logs. It is noted in the run directory, so that the folder of a process that
    was killed is removed by the next one."""
    note = run_dir / ".ray"
    if note.exists():
        left_over = Path(note.read_text(encoding="utf-8").strip())
        if left_over.name.startswith("rlhf-"):
            shutil.rmtree(left_over, ignore_errors=True)
    path = tempfile.mkdtemp(prefix="rlhf-", dir=config.cluster.temp_dir)
    note.write_text(path + "\n", encoding="utf-8")
    return path


def _device(config: RunConfig) -> str:
    gpus = ray.cluster_resources().get("GPU", 0)
    if config.cluster.device == "cuda" and not gpus:
        raise RLHFError("cluster.device = 'cuda': no node of the cluster has a GPU; use auto or cpu")
    if config.cluster.device == "auto":
        return "cuda" if gpus else "cpu"
    return config.cluster.device
