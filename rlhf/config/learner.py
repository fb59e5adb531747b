"""The DPO learner: batch, optimizer, loss, reference, DeepSpeed."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config.base import Reserved, Section
from rlhf.config.deepspeed import check_deepspeed
from rlhf.config.lora import Lora
from rlhf.config.loss import Loss as Loss
from rlhf.config.offload import Offload, check_offload
from rlhf.config.trainable import Trainable

ZERO_0_BF16 = (
    "learner.zero_stage 0 with policy.dtype bfloat16 is refused: DeepSpeed's wrapper takes a wrong first Adam step "
    "there; use learner.zero_stage 1 (the same memory on one rank) or policy.dtype float32"
)


class Optimizer(Section):
    """AdamW and its learning-rate schedule, which runs on the fraction of rounds done."""

    lr: float = Field(3.0e-5, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Decay after the warm-up, by fraction of all rounds."
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Fraction of all rounds with a linear warm-up.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this global norm.")

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"learner.optimizer.betas = {list(value)}: both have to be at least 0 and below 1")
        return value


class Reference(Section):
    """The policy that the implicit reward is measured against."""

    policy: Literal["initial", "round_start", "ema", "none"] = Field(
        "initial",
        description="initial: the policy the run started from, frozen (with LoRA the base with the adapters off, no "
        "second model); round_start: the policy before the round's first update, no second model; ema: a moving "
        "average of the policy, as it stands when the round starts; none: for losses without a reference, which load "
        "none in any case.",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="ema: what the average keeps of itself at each optimizer step; null is 0.99.",
    )
    offload: bool = Field(
        False, description="initial, ema: keep what is held for the reference in CPU memory between rounds (GPUs only)."
    )

    @model_validator(mode="after")
    def _means_something(self) -> "Reference":
        if self.ema_decay is not None and self.policy != "ema":
            raise ValueError(
                f"learner.reference.ema_decay = {self.ema_decay:g} with policy {self.policy}: it belongs to policy "
                "ema; remove it"
            )
        if self.offload and self.policy not in ("initial", "ema"):
            raise ValueError(
                f"learner.reference.offload = true with policy {self.policy}: no second copy is held; remove it"
            )
        return self


class Learner(Section):
    """DeepSpeed ranks in Ray actors."""

    world_size: int = Field(1, ge=1, description="DeepSpeed ranks, one Ray actor each.")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="ZeRO stage.")
    batch_size: int = Field(16, ge=1, description="Pairs per optimizer step, over all ranks.")
    micro_batch_size: int = Field(4, ge=1, description="Pairs per rank per forward.")
    epochs: int = Field(1, ge=1, description="Passes over a round's pairs.")
    max_length: int = Field(
        1024, ge=2, description="Longest prompt + response in tokens; a longer pair is dropped and counted."
    )
    optimizer: Optimizer = Field(default_factory=lambda: Optimizer(), description="Optimizer and schedule.")
    loss: Loss = Field(default_factory=lambda: Loss(), description="Preference loss.")
    reference: Reference = Field(default_factory=lambda: Reference(), description="Reference policy.")
    lora: Lora | None = Field(None, description="LoRA adapters; null trains all weights.")
    trainable: Trainable | None = Field(None, description="A named subset of parameters; null trains all weights.")
    warp: Reserved = Field(None, description="Reserved: rotated parametrisation.")
    prefix_sharing: bool = Field(
        True,
        description="Compute each prompt once for both responses; models that cannot take the mask fall back to "
        "padding and say so.",
    )
    pack_tokens: int | None = Field(
        None,
        ge=1,
        description="Pack a rank's pairs end to end into rows of at most this many tokens (shared prefixes counted "
        "once), one row a forward, in place of micro_batch_size pairs in rows of their own; a longer pair has a row of "
        "its own. For GPUs, where FlexAttention skips what a packed row masks; on a CPU attention is dense, and a row "
        "costs its length squared. null does not pack.",
    )
    attention: Literal["auto", "sdpa", "flex", "flash"] = Field(
        "auto",
        description="auto: on GPUs FlexAttention for rows that need a mask (prefix_sharing, pack_tokens), otherwise "
        "FlashAttention if it is installed; what does not give SDPA's numbers at start falls back to SDPA. flex and "
        "flash ask for one by name, on GPUs only.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    compile: bool = Field(
        False,
        description="torch.compile each decoder layer: faster steps after the first, which compiles (half a minute of "
        "CPU time, and a C++ compiler where there is no GPU). Not with zero_stage 3.",
    )
    offload: Offload = Field(default_factory=lambda: Offload(), description="What lies in CPU memory instead.")
    max_skipped_steps: int = Field(
        10, ge=1, description="Stop the run after this many steps in a row whose loss or gradient is not finite."
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="Merged over the generated DeepSpeed config. What other keys decide (dtype, batch, optimizer, "
        "clipping) is refused here.",
    )
    cpus: int | None = Field(
        None, ge=1, description="CPU threads of one rank; null shares the local machine's cores among the ranks."
    )

    @model_validator(mode="after")
    def _divisible(self) -> "Learner":
        if self.batch_size % self.world_size:
            raise ValueError(
                f"learner.batch_size {self.batch_size} must be a multiple of learner.world_size {self.world_size}"
            )
        return self

    @model_validator(mode="after")
    def _memory_fits(self) -> "Learner":
        check_deepspeed(self.deepspeed)
        check_offload(self.offload, self.zero_stage, self.deepspeed)
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "learner.compile = true with learner.zero_stage 3: DeepSpeed gathers weights one by one in hooks that "
                "cannot be compiled, which leaves slower steps than without; use zero_stage 2 or remove compile"
            )
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> "Learner":
        if self.attention == "flash" and (self.prefix_sharing or self.pack_tokens is not None):
            key = "pack_tokens" if self.pack_tokens is not None else "prefix_sharing"
            raise ValueError(
                f"learner.attention = flash with learner.{key}: FlashAttention takes no such mask; use auto, flex or "
                f"sdpa, or turn {key} off"
            )
        return self

    @model_validator(mode="after")
    def _one_parametrisation(self) -> "Learner":
        if self.trainable and self.lora:
            raise ValueError(
                "learner.trainable with learner.lora: adapters train in place of the weights; remove one of the two "
                "(learner.lora.target_modules says where adapters go)"
            )
        return self

    @model_validator(mode="after")
    def _reference_fits(self) -> "Learner":
        policy, needed = self.reference.policy, self.loss.needs_reference
        if policy == "none" and needed:
            raise ValueError(
                f"learner.reference.policy = none with learner.loss.type {self.loss.type}, which measures against a "
                "reference: use initial, round_start or ema, or a loss without one (simpo, cpo, orpo)"
            )
        if policy in ("round_start", "ema") and not needed:
            raise ValueError(
                f"learner.reference.policy = {policy} with learner.loss.type {self.loss.type}, which has no reference: "
                "use none"
            )
        if self.loss.exploration and policy != "round_start":
            raise ValueError(
                f"learner.loss.exploration with learner.reference.policy {policy}: its term is over responses that the "
                "reference wrote, which a round samples from round_start only; use that, or remove the exploration"
            )
        if self.reference.offload and (not needed or (policy == "initial" and self.lora)):
            reason = "the adapters are turned off instead" if needed else f"loss type {self.loss.type} has no reference"
            raise ValueError(f"learner.reference.offload = true: no second copy is held, {reason}; remove it")
        return self
