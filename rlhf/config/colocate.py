"""What `cluster.colocate` shares: each GPU holds one engine of a kind and one learner rank, which take turns."""

from typing import TYPE_CHECKING, Any

from rlhf.config.judge import EngineJudge, single_judges
from rlhf.config.learner import Learner

if TYPE_CHECKING:
    from rlhf.config.run import RunConfig
    from rlhf.config.system import Cluster

GPU_SHARE = 0.85
"""vLLM's `gpu_memory_utilization` of an engine that shares its GPU: who sleeps keeps a context of a gigabyte or so."""


def check_colocate(config: "RunConfig") -> None:
    """Raise `ValueError` where `cluster.colocate` and `sync.transport` meet what they cannot share."""
    if not config.cluster.colocate:
        if config.sync.transport == "ipc":
            raise ValueError(
                "sync.transport ipc hands weights over on one GPU: set cluster.colocate true, or use nccl or auto"
            )
        return
    if config.rounds.lookahead:
        raise ValueError(
            "cluster.colocate with rounds.lookahead 1: generators and learner take turns, nothing runs ahead; set "
            "rounds.lookahead 0"
        )
    if config.sync.transport == "nccl":
        raise ValueError(
            "cluster.colocate with sync.transport nccl: NCCL takes no two ranks on one GPU; use ipc, object_store or "
            "auto"
        )
    if config.sync.transport == "ipc" and config.cluster.device == "cpu":
        raise ValueError("sync.transport ipc needs a GPU; use object_store or auto with cluster.device cpu")
    ranks = config.learner.world_size
    if config.generator.replicas.elastic:
        raise ValueError(
            f"cluster.colocate with generator.replicas {config.generator.replicas}: generators stay where the learner "
            f"is; set generator.replicas {ranks}"
        )
    _check_actors("generator", config.generator.replicas.max, config.generator.tensor_parallel, ranks)
    for name, top in (("judge", config.judge), ("eval_judge", config.eval_judge)):
        for key, judge in single_judges(top, name) if top else ():
            if isinstance(judge, EngineJudge):
                _check_actors(key, judge.replicas, judge.tensor_parallel, ranks, fewer=True)


def refuse_colocate(cluster: "Cluster", why: str) -> None:
    """Raise `ValueError` where `cluster.colocate` has no meaning, saying `why`."""
    if cluster.colocate:
        raise ValueError(f"cluster.colocate = true: {why}; set it false")


def learner_sleeps(learner: Learner, dtype: str) -> bool:
    """Can the learner's weights, masters and optimizer state leave a GPU between its turns?

    DeepSpeed moves them for its ZeRO-1/2 optimizer. ZeRO 1 in bfloat16 has another one unless it is offloaded, ZeRO 3
    asks for an optimizer of DeepSpeed's own, and ZeRO 0 has none.
    """
    if learner.zero_stage == 1 and dtype == "bfloat16":
        return offloads_optimizer(learner)
    return learner.zero_stage in (1, 2)


def offloads_optimizer(learner: Learner) -> bool:
    """Is the optimizer in CPU memory for good, by `learner.offload` or by the raw DeepSpeed options?"""
    zero: Any = learner.deepspeed.get("zero_optimization", {})
    section = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    if isinstance(section, dict):
        return section.get("device", "none") != "none"
    return learner.offload.optimizer


def sharing_gpu(learner: Learner) -> Learner:
    """The learner as it runs on a GPU that it shares: what is held for the reference is there only while it scores."""
    reference = learner.reference.model_copy(update={"offload": True})
    return learner.model_copy(update={"reference": reference})


def _check_actors(key: str, replicas: int, tensor_parallel: int, ranks: int, fewer: bool = False) -> None:
    if tensor_parallel > 1:
        raise ValueError(
            f"cluster.colocate with {key}.tensor_parallel {tensor_parallel}: an engine shares one GPU with one learner "
            f"rank; set {key}.tensor_parallel 1"
        )
    if replicas > ranks or (replicas < ranks and not fewer):
        raise ValueError(
            f"cluster.colocate with {key}.replicas {replicas} and learner.world_size {ranks}: each GPU holds one "
            f"learner rank and one engine; set {key}.replicas {ranks}" + (" or fewer" if fewer else "")
        )
