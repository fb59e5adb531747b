"""What `sync.lora: adapters` can carry, and the ranks that vLLM serves."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.config.run import RunConfig

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for `max_lora_rank`."""

ENGINE_KEYS = (
    "enable_lora",
    "lora_dtype",
    "lora_target_modules",
    "max_cpu_loras",
    "max_lora_rank",
    "max_loras",
    "worker_extension_cls",
)
"""Engine arguments that follow from the config and are not a user's to set."""


def served_rank(rank: int) -> int:
    """The least `max_lora_rank` of vLLM that holds adapters of `rank`, at most the last of `SERVED_RANKS`."""
    return next(served for served in SERVED_RANKS if served >= rank)


def check_adapters(config: "RunConfig") -> None:
    """Raise `ValueError` where `sync.lora: adapters` meets what it cannot carry."""
    lora = config.learner.lora
    if lora is None:
        raise ValueError("sync.lora = adapters without learner.lora: there are none to send; set learner.lora")
    if lora.modules_to_save:
        raise ValueError(
            f"sync.lora = adapters with learner.lora.modules_to_save = {list(lora.modules_to_save)}: only adapters are "
            "sent, and these modules train in full; use sync.lora merged or leave them out"
        )
    if lora.rank > SERVED_RANKS[-1]:
        raise ValueError(
            f"sync.lora = adapters with learner.lora.rank = {lora.rank}: vLLM serves ranks up to {SERVED_RANKS[-1]}; "
            "lower it or use sync.lora merged"
        )
    if config.sync.transport in ("nccl", "ipc"):
        raise ValueError(
            f"sync.lora = adapters with sync.transport = {config.sync.transport}, which sends merged weights only; use "
            "object_store or auto"
        )
    if config.policy.dtype == "float32" and config.cluster.device == "cuda":
        raise ValueError(FLOAT32_ON_GPU)
    if taken := sorted(set(config.generator.engine).intersection(ENGINE_KEYS)):
        raise ValueError(f"generator.engine.{taken[0]} is set by sync.lora = adapters; remove it")


FLOAT32_ON_GPU = (
    "sync.lora = adapters with policy.dtype = float32 on GPUs: vLLM's LoRA kernels take 16-bit weights only there; use "
    "policy.dtype bfloat16 or sync.lora merged"
)
