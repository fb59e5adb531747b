"""vLLM's entry point: registers our weight transport in every process that holds a model."""

TRANSPORT = "rlhf_object_store"
NCCL = "nccl"
"""vLLM's own transport, which it registers itself."""


def register() -> None:
    """Register the transport with vLLM; safe to call twice, since vLLM loads plugins more than once a process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if TRANSPORT not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSPORT, "actors.engine.transfer", "ObjectStoreTransferEngine")
