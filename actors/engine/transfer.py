"""Receives weights from Ray's object store inside vLLM's worker: stage and check everything, then load.

An update comes in two calls. `stage` maps the buffers and checks names, shapes, sizes and checksums; if it fails the
engine has not been touched and goes on serving its old version. `load` runs vLLM's layer-wise reload on the staged
tensors; if that fails the model is lost, since vLLM cannot roll a reload back.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from actors.engine.receiver import Receiver
from rlhf.heap import trim_seldom


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Where this worker finds the cluster and its generator, and what a whole payload holds.

    `expected` lists (name, shape) of every checkpoint tensor, `deadline` is in seconds and for one payload.
    """

    address: str
    namespace: str
    holder: str
    expected: list[tuple[str, list[int]]]
    deadline: float


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
    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        """Join the cluster."""
        expected = {name: tuple(shape) for name, shape in init_info.expected}
        self._receiver = Receiver(
            init_info.address, init_info.namespace, init_info.holder, expected, init_info.deadline
        )

    def start_weight_update(self) -> None:
        """Nothing yet: the reload starts in the load phase, once the whole payload has passed its checks."""

    def finish_weight_update(self) -> None:
        """Nothing left: the load phase ends the reload."""

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Run one phase; raises `PayloadError` from `stage`, anything from `load`."""
        receiver = self._receiver
        assert receiver is not None, "init_transfer_engine comes first"
        if update_info.phase == "stage":
            receiver.stage(update_info.buckets, update_info.verify)
            return
        if update_info.phase == "load":
            self._load(receiver)
        receiver.drop()
        trim_seldom()

    def shutdown(self) -> None:
        """Drop the mapped buffers."""
        if self._receiver:
            self._receiver.drop()

    def _load(self, receiver: Receiver) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        model: Any = self.model
        model.load_weights((name, tensor.to(self.device)) for name, tensor in receiver.tensors())
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_heads()

    def _repack_heads(self) -> None:
        # With tied embeddings the head's packed copy is made before the embedding arrives and stays stale: digests
        # of the parameters agree while log-probs are off by 1.
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                assert isinstance(module.quant_method, QuantizeMethodBase)
                module.quant_method.process_weights_after_loading(module)
