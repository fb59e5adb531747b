"""CUDA IPC between two processes: what one fills the other copies, checks and lets go of."""

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actors.engine.ipc import IpcSender, staging_info

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TENSORS = 40
SIZE = 1 << 20
"""Bytes of a tensor; a bucket holds four."""


def export() -> Iterator[tuple[str, torch.Tensor]]:
    for index in range(TENSORS):
        yield f"t{index}", torch.full((SIZE // 4,), float(index))


def receive(connection: Any) -> None:
    """The engine's worker: stages what it is told of, answers when each copy is there, and says what it got."""
    from actors.engine.ipc_transfer import IpcReceiver, IpcUpdateInfo

    expected: dict[str, tuple[int, ...]] = {f"t{index}": (SIZE // 4,) for index in range(TENSORS)}
    receiver = IpcReceiver(expected, torch.device("cuda", 0))
    while (info := connection.recv()) is not None:
        receiver.stage(IpcUpdateInfo(**info))
        connection.send(
            [(name, tensor.unique().tolist()) for name, tensor in receiver.tensors()] if info["last"] else []
        )
    connection.close()


def test_two_buffers_carry_a_payload_again_and_again_and_are_given_back() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receive, args=(theirs,))
    process.start()
    try:
        sender = IpcSender(export, "cuda", 4 * SIZE)
        sender.begin()
        sender.end()
        base = torch.cuda.memory_reserved()
        for _ in range(5):
            sender.begin()
            buckets = sender.layout()
            assert len(buckets) == TENSORS // 4
            for number, bucket in enumerate(buckets):
                ours.send(staging_info(number, bucket, [sender.fill(number)], number == len(buckets) - 1, True))
                received = ours.recv()
            sender.end()
            assert received == [(f"t{index}", [float(index)]) for index in range(TENSORS)]
        # vLLM's importer opened and released each export once, or torch would hold on to the buffers.
        assert torch.cuda.memory_reserved() <= base
    finally:
        ours.send(None)
        process.join(60)
        assert process.exitcode == 0
