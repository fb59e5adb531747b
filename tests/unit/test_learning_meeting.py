"""The port that a learner's ranks meet at stays theirs until they meet."""

import errno
import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist

from rlhf.errors import RLHFError
from rlhf.learning.engine import hold_port, join


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `join` sets is taken back."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def rank_one(port: int) -> None:
    """The other rank, in a process of its own."""
    join("cpu", 1, 2, "127.0.0.1", port, 120)
    dist.all_reduce(torch.ones(1))
    # A group that is left open when Python ends can crash in its threads.
    dist.destroy_process_group()


def test_a_port_that_is_held_is_taken_for_all_others_and_served_to_the_ranks() -> None:
    meeting = hold_port("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use") as refused:
        other.bind(("", meeting.port))
    assert refused.value.errno == errno.EADDRINUSE
    process = multiprocessing.get_context("spawn").Process(target=rank_one, args=(meeting.port,), daemon=True)
    process.start()
    try:
        join("cpu", 0, 2, "127.0.0.1", meeting.port, 120)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        process.join(60)
    assert process.exitcode == 0


def test_a_port_that_somebody_else_took_ends_with_a_line_that_names_it() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RLHFError, match=rf"learner rank 0: 127\.0\.0\.1:{port}, .* is another process's"):
            join("cpu", 0, 1, "127.0.0.1", port, 5)
