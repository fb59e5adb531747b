"""Joining a cluster that is none: what else may listen at the address."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import psutil
import pytest
import ray

from actors import cluster
from actors.cluster import connect
from rlhf.config.system import Cluster
from rlhf.errors import RLHFError


@contextmanager
def closed() -> Iterator[int]:
    """A port that is bound, and where nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server.getsockname()[1]


@contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@contextmanager
def web() -> Iterator[int]:
    """A web server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(
    ("port", "words"),
    [
        (closed, "nothing answers there (Connection refused); start the cluster's head"),
        (silent, "no Ray head answers there (deadline_exceeded); give the address of its GCS"),
        (web, "no Ray head answers there (unavailable); give the address of its GCS"),
    ],
)
def test_a_port_without_a_head_is_one_line(port, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_S", 1.0 if port is silent else 30.0)
    with port() as number:
        address = f"127.0.0.1:{number}"
        with pytest.raises(RLHFError) as error, connect("x", Cluster(address=address), 1 << 28):
            pass
    assert str(error.value).startswith(f"cluster.address = '{address}': {words}")
    assert not ray.is_initialized()


class Stuck:
    """Its process can be told to stand still, as one that waits for a lock in its own exit."""

    def pids(self) -> list[int]:
        """Its own and a child's."""
        return [os.getpid(), psutil.Popen(["sleep", "600"]).pid]

    def stand(self) -> None:
        """Nothing but SIGKILL ends a stopped process."""
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_private_rays_workers_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "END_S", 1.0)
    mine = psutil.Popen(["sleep", "60"])
    with connect("x", Cluster(), 1 << 28):
        actor = ray.remote(Stuck).options(num_cpus=0).remote()
        processes = [psutil.Process(pid) for pid in ray.get(actor.pids.remote())]
        actor.stand.remote()
        while processes[0].status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
    left = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    survived = mine.is_running()
    mine.kill()
    mine.wait()
    assert not left
    assert survived, "it is not Ray's"
