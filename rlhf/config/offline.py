"""Training on a preference set: offline DPO and supervised fine-tuning, and what judge training shares with them."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf.config.base import Section
from rlhf.config.colocate import refuse_colocate
from rlhf.config.data import Policy
from rlhf.config.judge import check_secrets
from rlhf.config.learner import ZERO_0_BF16, Learner
from rlhf.config.names import folder_name
from rlhf.config.system import Checkpoint, Cluster, Monitor

PreferenceFormat = Literal["auto", "explicit", "implicit", "hh_rlhf", "labelled"]


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


class Anchor(PreferenceData):
    """A preference set that is trained beside each round's own pairs, against the same reference."""

    share: float = Field(1.0, gt=0, description="Its pairs of a step, as a fraction of the step's own pairs.")
    weight: float = Field(1.0, ge=0, description="Weight of their mean loss in the step's; 0 leaves them out.")


class OfflineTraining(Section):
    """What every training on a preference set has."""

    name: str = Field(description="Name of the run and of its folder under `output_dir`.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of order and training.")
    output_dir: str = Field("runs", description="Folder that holds run directories.")
    policy: Policy = Field(description="The model that is trained.")
    epochs: int = Field(1, ge=1, description="Passes over the pairs.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Optimizer steps of linear warm-up; null goes by `learner.optimizer.warmup_ratio`."
    )
    checkpoint_steps: int = Field(100, ge=1, description="Optimizer steps between checkpoints and evaluations.")
    learner: Learner = Field(default_factory=lambda: Learner(), description="The learner.")
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint(), description="Checkpoints.")
    monitor: Monitor = Field(default_factory=lambda: Monitor(), description="Monitoring.")
    cluster: Cluster = Field(default_factory=lambda: Cluster(), description="The cluster.")

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        return folder_name(value)

    @model_validator(mode="after")
    def _passes_and_precision(self) -> Self:
        if self.learner.epochs != 1:
            raise ValueError(
                f"learner.epochs {self.learner.epochs}: passes over the pairs are `epochs` of the training; leave it 1"
            )
        if self.learner.loss.exploration:
            raise ValueError(
                "learner.loss.exploration: the reference wrote no response of a preference set; remove it, or train on "
                "prompts"
            )
        if self.learner.zero_stage == 0 and self.policy.dtype == "bfloat16":
            raise ValueError(ZERO_0_BF16)
        check_secrets(self.learner.deepspeed, "learner.deepspeed.")
        refuse_colocate(self.cluster, "a training on a set of preferences has no generators to share GPUs with")
        return self

    def warmed_up(self, segments: float) -> Learner:
        """The learner with `warmup_steps` as a share of so many `segments` of `checkpoint_steps` steps each.

        A last segment that is not full counts by what it holds, as in the fraction that schedules go by.
        """
        if self.warmup_steps is None:
            return self.learner
        share = min(self.warmup_steps / (segments * self.checkpoint_steps), 0.999)
        optimizer = self.learner.optimizer.model_copy(update={"warmup_ratio": share})
        return self.learner.model_copy(update={"optimizer": optimizer})


class OfflineConfig(OfflineTraining):
    """A run whose pairs come from a preference set: offline DPO, or supervised fine-tuning with `loss.type: sft`."""

    preferences: TrainingData = Field(description="The preference pairs, in place of prompts, rounds and a judge.")
    anchor: Anchor | None = Field(
        None, description="A second preference set, whose loss is added in every step; null has none."
    )

    @model_validator(mode="after")
    def _reference_stays(self) -> Self:
        if self.learner.reference.policy == "round_start":
            raise ValueError(
                "learner.reference.policy = round_start: a segment of a preference set was not written by the policy "
                "that it starts from, which every evaluation would equal; use initial or ema"
            )
        return self
