"""The receiving end of the `object_store` transport inside vLLM's worker: maps a payload and checks it whole."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray._private import worker

from actors.weights.payload import check_complete, unpack, verify_bucket
from rlhf.records import Bucket, TensorSpec


class Receiver:
    """Holds the payload that was staged last."""

    def __init__(
        self, address: str, namespace: str, holder: str, expected: Mapping[str, tuple[int, ...]], deadline: float
    ):
        """Join the cluster: an engine process is no Ray worker, but may connect as a driver.

        `holder` is the generator's actor, `expected` holds name and shape of every tensor of a whole payload, which
        must be here within `deadline` seconds.
        """
        self._deadline = deadline
        self._namespace = namespace
        self._holder = holder
        self._expected = expected
        self._staged: list[tuple[Bucket, np.ndarray]] = []
        if not ray.is_initialized():
            ray.init(
                address=address,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
            # Ray's thread that prints errors of the cluster becomes a busy loop once the head has forgotten its
            # subscription, and nobody reads what an engine prints.
            worker.global_worker.threads_stopped.set()

    def stage(self, tables: Sequence[Sequence[Mapping[str, Any]]], verify: bool) -> None:
        """Map the buffers of a payload whose tensors `tables` lists, buffer by buffer.

        Raises `PayloadError` for a payload that is wrong, Ray's `GetTimeoutError` for one that does not come.
        """
        # The references come through the generator actor, in band: Ray then counts this process as a borrower,
        # and the buffers are mapped from the node's shared memory, not copied.
        holder = ray.get_actor(self._holder, namespace=self._namespace)
        end = time.monotonic() + self._deadline
        references: list[Any] = ray.get(holder.staged_references.remote(), timeout=self._deadline)
        buffers: list[np.ndarray] = ray.get(references, timeout=max(0.0, end - time.monotonic()))
        buckets = [
            Bucket(tuple(_spec(row) for row in rows), len(buffer)) for rows, buffer in zip(tables, buffers, strict=True)
        ]
        if verify:
            check_complete(buckets, self._expected)
            for bucket, buffer in zip(buckets, buffers, strict=True):
                verify_bucket(bucket, buffer)
        self._staged = list(zip(buckets, buffers, strict=True))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is staged; views of read-only memory."""
        for bucket, buffer in self._staged:
            yield from unpack(bucket, buffer)

    def drop(self) -> None:
        """Forget what is staged."""
        self._staged = []


def _spec(row: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(**{**row, "shape": tuple(row["shape"])})
