"""vLLM's entry point: registers our weight transports in every process that holds a model."""

TRANSPORT = "rlhf_object_store"
NCCL = "nccl"
"""vLLM's own transport, which it registers itself."""
IPC = "ipc"
IPC_TRANSPORT = "rlhf_ipc"
"""`sync.transport: ipc`, and vLLM's name of its engine here; the name `ipc` is that of vLLM's own."""


def register() -> None:
    """Register the transports with vLLM; safe to call twice, since vLLM loads plugins more than once a process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if TRANSPORT not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSPORT, "actors.engine.transfer", "ObjectStoreTransferEngine")
        WeightTransferEngineFactory.register_engine(IPC_TRANSPORT, "actors.engine.ipc_transfer", "IpcTransferEngine")
