"""Receives weights from Ray's object store inside vLLM's worker: stage and check everything, then load.

An update comes in two calls. `stage` maps the buffers and checks names, shapes, sizes and checksums; if it fails the
engine has not been touched and goes on serving its old version. `load` runs vLLM's layer-wise reload on the staged
tensors; if that fails the model is lost, since vLLM cannot roll a reload back.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from actors.weights.payload import check_complete, unpack, verify_bucket
from rlhf.records import Bucket, TensorSpec


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Where this worker finds the cluster and its generator, and what a whole payload holds.

    `expected` lists (name, shape) of every checkpoint tensor.
    """

    address: str
    namespace: str
    holder: str
    expected: list[tuple[str, list[int]]]


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One phase of an update: `stage` with the buckets' tables, `load`, or `discard`."""

    phase: str
    verify: bool = True
    buckets: list[list[dict[str, Any]]] = field(default_factory=list)


class ObjectStoreTransferEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """vLLM's receiving end of the `object_store` transport."""

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        """Join the cluster: an engine process is no Ray worker, but may connect as a driver."""
        self._info = init_info
        self._staged: list[tuple[Bucket, np.ndarray]] = []
        if not ray.is_initialized():
            ray.init(
                address=init_info.address,
                namespace=init_info.namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )

    def start_weight_update(self) -> None:
        """Nothing yet: the reload starts in the load phase, once the whole payload has passed its checks."""

    def finish_weight_update(self) -> None:
        """Nothing left: the load phase ends the reload."""

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Run one phase; raises `PayloadError` from `stage`, anything from `load`."""
        if update_info.phase == "stage":
            self._stage(update_info)
        elif update_info.phase == "load":
            self._load()
        self._staged = [] if update_info.phase != "stage" else self._staged

    def shutdown(self) -> None:
        """Drop the mapped buffers."""
        self._staged = []

    def _stage(self, update_info: ObjectStoreUpdateInfo) -> None:
        # The references come through the generator actor, in band: Ray then counts this process as a borrower,
        # and the buffers are mapped from the node's shared memory, not copied.
        holder = ray.get_actor(self._info.holder, namespace=self._info.namespace)
        buffers: list[np.ndarray] = ray.get(ray.get(holder.staged_references.remote()))
        buckets = [
            Bucket(tuple(_spec(row) for row in rows), len(buffer))
            for rows, buffer in zip(update_info.buckets, buffers, strict=True)
        ]
        if update_info.verify:
            check_complete(buckets, {name: tuple(shape) for name, shape in self._info.expected})
            for bucket, buffer in zip(buckets, buffers, strict=True):
                verify_bucket(bucket, buffer)
        self._staged = [(bucket, buffer) for bucket, buffer in zip(buckets, buffers, strict=True)]

    def _load(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        model: Any = self.model
        model.load_weights(self._tensors())
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_heads()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket, buffer in self._staged:
            for name, tensor in unpack(bucket, buffer):
                yield name, tensor.to(self.device)

    def _repack_heads(self) -> None:
        # With tied embeddings the head's packed copy is made before the embedding arrives and stays stale: digests
        # of the parameters agree while log-probs are off by 1.
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                assert isinstance(module.quant_method, QuantizeMethodBase)
                module.quant_method.process_weights_after_loading(module)


def _spec(row: dict[str, Any]) -> TensorSpec:
    return TensorSpec(**{**row, "shape": tuple(row["shape"])})
