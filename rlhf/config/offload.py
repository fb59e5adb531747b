"""What the learner keeps in CPU memory instead of GPU memory, by DeepSpeed's ZeRO-Offload."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from rlhf.config.base import Section


class Offload(Section):
    """CPU offload of the learner (ZeRO-Offload: Ren et al. 2021). On a CPU it changes nothing but where copies lie."""

    optimizer: bool = Field(
        False,
        description="Keep fp32 masters and optimizer state in pinned CPU memory and step there, by torch's own AdamW: "
        "12 bytes a trained parameter less on the GPUs, slower steps. Needs zero_stage 1 or above.",
    )
    parameters: bool = Field(
        False,
        description="Keep weights in pinned CPU memory and fetch a layer at a time, those of a frozen reference too. "
        "Needs zero_stage 3.",
    )


def check_offload(offload: Offload, zero_stage: int, deepspeed: Mapping[str, Any]) -> None:
    """Raise `ValueError` where the ZeRO stage cannot do what the keys or the raw overrides ask for.

    DeepSpeed itself ignores offloading below the stage that has it, and would take another stage than the one that
    the learner was built for.
    """
    raw = deepspeed.get("zero_optimization")
    zero = raw if isinstance(raw, Mapping) else {}
    prefix = "learner.deepspeed.zero_optimization"
    if "stage" in zero and zero["stage"] != zero_stage:
        raise ValueError(f"{prefix}.stage = {zero['stage']!r}: set learner.zero_stage (now {zero_stage}) instead")
    wanted = (
        ("learner.offload.optimizer", offload.optimizer, 1, "1 or above"),
        (f"{prefix}.offload_optimizer", _offloads(zero.get("offload_optimizer")), 1, "1 or above"),
        ("learner.offload.parameters", offload.parameters, 3, "3"),
        (f"{prefix}.offload_param", _offloads(zero.get("offload_param")), 3, "3"),
    )
    for key, asked, lowest, stages in wanted:
        if asked and zero_stage < lowest:
            raise ValueError(f"{key} with learner.zero_stage {zero_stage}: it needs zero_stage {stages}")


def _offloads(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("device", "none") != "none"
