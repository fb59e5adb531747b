"""Sends weights over NCCL: vLLM's own trainer engine, on a learner rank.

vLLM's trainer normally drives the engines itself. Here the driver does, with deadlines, and this end only broadcasts.
No wait on a GPU can be interrupted from inside, so another thread watches the engines' calls and the clock, and breaks
the group when one of them says so.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from actors.weights.nccl import NcclGroup
from rlhf.errors import EngineLostError
from rlhf.records import Bucket, TensorSpec

Export = Callable[[], Iterator[tuple[str, torch.Tensor]]]

POLL_S = 0.2
GRACE_S = 3.0
"""How long a sender that is told to stop may take before its group is broken under it."""


class Stopped(Exception):
    """The sender was told to stop."""


class ExportSource(WeightSource):
    """A learner's exported tensors as vLLM's trainer wants them: on the sender's device, all ranks in step."""

    def __init__(self, export: Export, device: str | None):
        """`device` is where to put each tensor; None leaves it, on a rank that does not send."""
        self._export = export
        self._device = device
        self._meta: list[ParamMeta] | None = None
        self._running: Iterator[tuple[str, torch.Tensor]] | None = None
        self._stopped = threading.Event()

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of every tensor; exports once, on all ranks, and remembers what it saw."""
        if self._meta is None:
            self._meta = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._export()]
        return self._meta

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._running = self._export()
        for name, tensor in self._running:
            if self._stopped.is_set():
                raise Stopped
            yield name, tensor.to(self._device) if self._device else tensor

    def reset(self) -> None:
        """Before a new sending: nothing of it is gone through yet."""
        self._stopped.clear()
        self._running = None

    def stop(self) -> None:
        """Let the iteration raise `Stopped` at the next tensor."""
        self._stopped.set()

    def drain(self) -> None:
        """Go through what is left of a broken sending: the other ranks gather all of it and wait for this one."""
        for _ in self._export() if self._running is None else self._running:
            pass


class SilentClient:
    """vLLM's control plane of the engines, which the driver has taken over."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Done by the driver."""

    def start_weight_update(self) -> None:
        """Done by the driver."""

    def update_weights(self, update_info: Any) -> None:
        """Done by the driver."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Done by the driver."""


class NcclSender:
    """One learner rank's end of the group. Rank 0 sends; the others take part in gathering the tensors."""

    def __init__(self, export: Export, rank: int, device: str):
        self._rank = rank
        self._device = device
        self._source = ExportSource(export, device if rank == 0 else None)
        self._engine: NCCLTrainerWeightTransferEngine | None = None
        self._lock = threading.Lock()

    def table(self) -> Bucket:
        """The payload's tensors in the order of sending, without bytes or checksums; every rank has to call."""
        specs, offset = [], 0
        for meta in self._source.metadata():
            nbytes = meta.dtype.itemsize * torch.Size(meta.shape).numel()
            dtype = str(meta.dtype).removeprefix("torch.")
            specs.append(TensorSpec(meta.name, dtype, meta.shape, offset, nbytes, checksum=""))
            offset += nbytes
        return Bucket(tuple(specs), offset)

    def open(self, group: NcclGroup, calls: Sequence[Any], seconds: float) -> None:
        """Join a group and leave the old one; raises `EngineLostError` if a call fails or `seconds` pass first."""
        self.close()
        joined, abandoned = threading.Event(), threading.Event()
        errors: list[BaseException] = []

        # NCCL's own meeting knows no deadline: it may be left waiting in its thread.
        def join() -> None:
            try:
                engine = self._join(group)
                with self._lock:
                    if abandoned.is_set():
                        engine.shutdown()
                    else:
                        self._engine = engine
            except Exception as error:
                errors.append(error)
            finally:
                joined.set()

        threading.Thread(target=join, daemon=True).start()
        reason = first_failure(calls, seconds, joined)
        if joined.is_set() and not errors:
            return
        abandoned.set()
        self.close()
        raise EngineLostError(f"NCCL group of {group.world_size}: {errors[0] if errors else reason}")

    def send(self, calls: Sequence[Any], seconds: float) -> None:
        """Broadcast the weights; raises `EngineLostError`, the group broken, if a call fails or `seconds` pass first.

        Every rank has to call. All of the export is gone through in any case, so that the ranks stay in step.
        """
        engine = self._engine
        if engine is None:
            raise EngineLostError("NCCL group: not open")
        self._source.reset()
        done = threading.Event()
        reasons: list[str] = []

        def watch() -> None:
            reason = first_failure(calls, seconds, done)
            if reason and not done.is_set():
                reasons.append(reason)
                self._source.stop()
                # Breaking a group while a thread enqueues on it is unsafe; one that waits on the GPU enqueues nothing.
                if not done.wait(GRACE_S):
                    self.close()

        if self._rank == 0:
            threading.Thread(target=watch, daemon=True).start()
        try:
            if self._device == "cuda":
                # The broadcasts run on streams of their own, which do not wait for the last step's.
                torch.cuda.synchronize()
            engine.send_weights()
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
        finally:
            done.set()
            self._source.drain()
        if reasons:
            self.close()
            raise EngineLostError(f"NCCL group: sending failed: {reasons[0]}")

    def close(self) -> None:
        """Leave the group, breaking off what runs on it."""
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.shutdown()

    def _join(self, group: NcclGroup) -> NCCLTrainerWeightTransferEngine:
        info = NCCLTrainerInitInfo(
            group.address,
            group.port,
            group.world_size,
            group.packed,
            group.buffer_bytes,
            rank=self._rank,
        )
        engine = NCCLTrainerWeightTransferEngine.trainer_init(info, client=SilentClient(), source=self._source)
        if engine.is_sender and (engine.model_update_group is None or engine.model_update_group.disabled):
            # vLLM would send nothing and say nothing.
            raise RuntimeError("the NCCL library could not be loaded, or VLLM_DISABLE_PYNCCL is set")
        return engine


def first_failure(calls: Sequence[Any], seconds: float, done: threading.Event) -> str | None:
    """Wait until `done`; why to stop waiting if a Ray call fails or `seconds` pass before that."""
    end = time.monotonic() + seconds
    waiting = list(calls)
    while not done.wait(0 if waiting else POLL_S):
        if time.monotonic() > end:
            return f"not done within {seconds:.0f} s"
        ready, waiting = ray.wait(waiting, timeout=POLL_S) if waiting else ([], [])
        for call in ready:
            try:
                ray.get(call)
            except Exception as error:
                return str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
    return None
