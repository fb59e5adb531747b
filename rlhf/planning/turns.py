"""Memory of a GPU that actors share in turns (`cluster.colocate`): the largest turn counts, not their sum.

In bytes, for one GPU; P numbers of the policy, b bytes of its dtype:

- a turn takes what its role takes, a gigabyte for each process that sleeps beside it (CUDA's context, libraries), and
  the learner's weights and optimizer where it cannot sleep (`learner_sleeps`);
- the update is a turn of the generators without their KV cache: P b, with `ipc` another P b for the staged payload and
  two buckets of the learner's;
- in CPU memory lie, of who sleeps, the learner's weights and optimizer and a judge's weights. The generators' are
  dropped before an update, and lie there only where a judge has a turn between them and the learner, or `sync.lora`
  sends adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlhf.config import RunConfig
from rlhf.config.colocate import learner_sleeps
from rlhf.planning.learner import GIB

if TYPE_CHECKING:
    from rlhf.planning.plan import RolePlan

CONTEXT = GIB
STATES = ("weights", "gathered weights", "optimizer")
"""Parts of a learner that its steps leave on the GPU."""


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """Whose turn it is, and bytes by part on one GPU."""

    name: str
    memory: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of one GPU."""
        return sum(self.memory.values())


def uses_ipc(config: RunConfig, device: str) -> bool:
    """Do weights go from learner to engine by CUDA IPC?"""
    if device != "cuda" or not config.cluster.colocate:
        return False
    automatic = config.sync.lora == "merged" and not config.sync.sparse
    return config.sync.transport == "ipc" or (config.sync.transport == "auto" and automatic)


def plan_turns(config: RunConfig, roles: Sequence["RolePlan"], payload: int) -> tuple[TurnPlan, ...]:
    """The turns of the roles with GPUs; `payload` is P b."""
    sharing = [role for role in roles if role.gpus]
    contexts, staying = {"asleep beside it": CONTEXT * (len(sharing) - 1)}, _staying(config, sharing)
    turns = []
    for role in sharing:
        # What stays of the learner is in its own turn already.
        others = contexts if role.name == "learner" else contexts | staying
        turns.append(TurnPlan(role.name, role.memory | others))
        if role.name == "generator":
            update = {name: size for name, size in role.memory.items() if name != "KV cache"}
            update |= contexts | staying
            if uses_ipc(config, "cuda"):
                update |= {"staging": payload, "buckets": 2 * min(payload, config.sync.bucket_mb << 20)}
            turns.append(TurnPlan("update", update))
    return tuple(turns)


def with_host_copies(config: RunConfig, roles: Sequence["RolePlan"]) -> list["RolePlan"]:
    """The roles with what they put into CPU memory while they sleep."""
    judged = any(role.gpus for role in roles if role.name not in ("generator", "learner"))
    found = []
    for role in roles:
        copied = role.memory.get("weights", 0)
        if role.name == "learner":
            copied = _states(role) if learner_sleeps(config.learner, config.policy.dtype) else 0
        elif role.name == "generator" and not (judged or config.sync.lora == "adapters"):
            copied = 0
        found.append(replace(role, host=role.host | {"asleep": copied}) if role.gpus and copied else role)
    return found


def turn_notes(config: RunConfig, roles: Sequence["RolePlan"], device: str) -> tuple[str, ...]:
    """What a user should know of sharing."""
    if not config.cluster.colocate:
        return ()
    if device != "cuda":
        return ("cluster.colocate without GPUs: actors take turns, but nothing sleeps and no memory is given back",)
    stays = sum(_staying(config, roles).values())
    if not stays:
        return ()
    return (
        f"the learner cannot leave the GPU with learner.zero_stage {config.learner.zero_stage}: {stays / GIB:.2f} GiB "
        "of it stay beside the generators, whose generator.engine.gpu_memory_utilization has to leave room for them; "
        "learner.zero_stage 2 moves them to CPU memory",
    )


def _staying(config: RunConfig, roles: Sequence["RolePlan"]) -> dict[str, int]:
    learner = next(role for role in roles if role.name == "learner")
    stays = 0 if learner_sleeps(config.learner, config.policy.dtype) else _states(learner)
    return {"learner that stays": stays} if stays else {}


def _states(learner: "RolePlan") -> int:
    return sum(learner.memory.get(part, 0) for part in STATES)
