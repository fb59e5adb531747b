"""Configs of the `rlhf judge` commands: using a judge, and training one."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config.base import Section
from rlhf.config.data import Policy
from rlhf.config.judge import Judge
from rlhf.config.learner import ZERO_0_BF16, Learner, Loss, Optimizer
from rlhf.config.names import folder_name
from rlhf.config.system import Checkpoint, Cluster, Monitor

PreferenceFormat = Literal["auto", "explicit", "implicit", "hh_rlhf", "labelled"]


class JudgeRun(Section):
    """A judge on its own, for `rlhf judge score` and `rlhf judge bench`."""

    name: str = Field("judge", description="Name of the command's Ray namespace.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the engine.")
    judge: Judge = Field(description="The judge; a local model's `path` is needed here.")
    cluster: Cluster = Field(default_factory=lambda: Cluster(), description="The cluster.")


class PreferenceData(Section):
    """A preference set."""

    path: str = Field(description="JSONL, Parquet or CSV file (optionally .gz), or a Hugging Face dataset id.")
    name: str | None = Field(None, description="Configuration name of a Hugging Face dataset.")
    split: str = Field("train", description="Dataset split (Hugging Face datasets only).")
    format: PreferenceFormat = Field(
        "auto",
        description="explicit: prompt, chosen, rejected; implicit: chosen and rejected share their first turns; "
        "hh_rlhf: whole dialogues; labelled: prompt, a, b and the label a, b or tie; auto decides by the columns.",
    )
    limit: int | None = Field(None, ge=1, description="Use the first pairs only.")


class TrainingData(PreferenceData):
    """A preference set to train on, and what is held out of it."""

    held_out: PreferenceData | None = Field(None, description="Pairs for the evaluation; null takes `held_out_count`.")
    held_out_count: int = Field(256, ge=0, description="Last pairs of the set kept for the evaluation.")


class JudgeLoss(Loss):
    """What is learned from an answer."""

    type: Literal["sft", "choice"] = Field(  # type: ignore[assignment]
        "sft",
        description="sft: -log p(answer) over the vocabulary (the published recipe); choice: -log p(answer) over `A` "
        "and `B` only.",
    )
    beta: float = Field(1.0, gt=0, description="choice only: sharpness of the softmax over the two answers.")
    average: float = Field(
        0.0,
        ge=0,
        le=1,
        description="With orders both: the first share of the training in which the loss takes the mean log-probs of "
        "both orders, where a preference for a place cancels; afterwards each order counts for itself.",
    )

    def averages(self, fraction: float) -> bool:
        """See `average`."""
        return fraction < self.average


class JudgeLearner(Learner):
    """The learner of `rlhf judge train`; rows count where runs count pairs."""

    batch_size: int = Field(64, ge=1, description="Rows per optimizer step, over all ranks.")
    micro_batch_size: int = Field(8, ge=1, description="Rows per rank per forward.")
    max_length: int = Field(3072, ge=16, description="Longest row in tokens; a longer context is cut from the left.")
    optimizer: Optimizer = Field(
        default_factory=lambda: Optimizer(lr=5e-6, betas=(0.9, 0.999), schedule="cosine", warmup_ratio=0.03),
        description="Optimizer and schedule.",
    )
    loss: JudgeLoss = Field(default_factory=lambda: JudgeLoss(), description="Loss.")


class JudgeTraining(Section):
    """`rlhf judge train`: a pair-preference model from preference pairs (METHODS of RLHFlow's pair model)."""

    name: str = Field(description="Name of the run and of its folder under `output_dir`.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of sides, order and training.")
    output_dir: str = Field("runs", description="Folder that holds run directories.")
    policy: Policy = Field(description="The model that becomes the judge.")
    data: TrainingData = Field(description="The preference pairs.")
    orders: Literal["random", "both"] = Field(
        "random",
        description="random: a row a pair, sides drawn from the seed; both: two rows a pair, one an order, in the same "
        "optimizer step.",
    )
    epochs: int = Field(1, ge=1, description="Passes over the pairs.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Optimizer steps of linear warm-up; null goes by `learner.optimizer.warmup_ratio`."
    )
    checkpoint_steps: int = Field(100, ge=1, description="Optimizer steps between checkpoints and evaluations.")
    learner: JudgeLearner = Field(default_factory=lambda: JudgeLearner(), description="The learner.")
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint(), description="Checkpoints.")
    monitor: Monitor = Field(default_factory=lambda: Monitor(), description="Monitoring.")
    cluster: Cluster = Field(default_factory=lambda: Cluster(), description="The cluster.")

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        return folder_name(value)

    def warmed_up(self, segments: int) -> JudgeLearner:
        """The learner with `warmup_steps` as a share of `segments` of `checkpoint_steps` steps each."""
        if self.warmup_steps is None:
            return self.learner
        share = min(self.warmup_steps / (segments * self.checkpoint_steps), 0.999)
        optimizer = self.learner.optimizer.model_copy(update={"warmup_ratio": share})
        return self.learner.model_copy(update={"optimizer": optimizer})

    @model_validator(mode="after")
    def _whole_pairs(self) -> "JudgeTraining":
        if self.orders == "both" and self.learner.batch_size % 2:
            raise ValueError(
                f"learner.batch_size {self.learner.batch_size} with orders both: a step holds both rows of a pair; "
                "make it even"
            )
        if self.orders == "random" and self.learner.loss.average:
            raise ValueError(
                f"learner.loss.average {self.learner.loss.average:g} with orders random: there is one order of a pair; "
                "set orders both, or average 0"
            )
        if self.orders == "both" and self.learner.micro_batch_size % 2:
            raise ValueError(
                f"learner.micro_batch_size {self.learner.micro_batch_size} with orders both: both rows of a pair are "
                "computed together; make it even"
            )
        if self.learner.epochs != 1:
            raise ValueError(
                f"learner.epochs {self.learner.epochs}: passes over the pairs are `epochs` of the training; leave it 1"
            )
        if self.learner.zero_stage == 0 and self.policy.dtype == "bfloat16":
            raise ValueError(ZERO_0_BF16)
        return self
