"""LoRA adapters on the policy."""

from typing import Literal

from pydantic import Field

from rlhf.config.base import Section


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021) in place of the full weights; only they get optimizer state."""

    rank: int = Field(16, ge=1, description="Rank of each adapter.")
    alpha: int = Field(32, ge=1, description="The adapter's product is scaled by alpha / rank.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on the adapters' input while training. The log-probs of a step are then not those of the "
        "policy that sampled: mismatch/* is left out.",
    )
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear",
        description="Linear layers that get an adapter, by the last part of their name or more of it (q_proj, "
        "layers.0.mlp.up_proj); all-linear takes all but the LM head.",
    )
    modules_to_save: tuple[str, ...] = Field(
        (), description="Modules that train in full beside the adapters, named in the same way (norm)."
    )
    bias: Literal["none"] = Field("none", description="Biases stay as they are.")
