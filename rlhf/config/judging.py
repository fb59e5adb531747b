"""Configs of the `rlhf judge` commands: using a judge, and training one."""

from typing import Literal

from pydantic import Field, model_validator

from rlhf.config.base import Section
from rlhf.config.colocate import refuse_colocate
from rlhf.config.judge import Judge, check_deadline
from rlhf.config.learner import Learner, Loss, Optimizer
from rlhf.config.offline import OfflineTraining, TrainingData
from rlhf.config.system import Cluster


class JudgeRun(Section):
    """A judge on its own, for `rlhf judge score` and `rlhf judge bench`."""

    name: str = Field("judge", description="Name of the command's Ray namespace.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the engine.")
    judge: Judge = Field(description="The judge; a local model's `path` is needed here.")
    cluster: Cluster = Field(default_factory=lambda: Cluster(), description="The cluster.")

    @model_validator(mode="after")
    def _late_is_invalid(self) -> "JudgeRun":
        check_deadline(self.judge, "judge", self.cluster.deadlines.judge)
        refuse_colocate(self.cluster, "a judge on its own has nobody to share GPUs with")
        return self


class JudgeLoss(Loss):
    """What is learned from an answer."""

    type: Literal["sft", "choice"] = Field(
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


class JudgeTraining(OfflineTraining):
    """`rlhf judge train`: a pair-preference model from preference pairs ("RLHF Workflow", TMLR 2024)."""

    data: TrainingData = Field(description="The preference pairs.")
    orders: Literal["random", "both"] = Field(
        "random",
        description="random: a row a pair, sides drawn from the seed; both: two rows a pair, one an order, in the same "
        "micro-batch.",
    )
    learner: JudgeLearner = Field(default_factory=lambda: JudgeLearner(), description="The learner.")

    @model_validator(mode="after")
    def _whole_pairs(self) -> "JudgeTraining":
        both = self.orders == "both"
        if both and self.learner.batch_size % 2:
            raise ValueError(
                f"learner.batch_size {self.learner.batch_size} with orders both: a step holds both rows of a pair; "
                "make it even"
            )
        if both and self.learner.micro_batch_size % 2:
            raise ValueError(
                f"learner.micro_batch_size {self.learner.micro_batch_size} with orders both: both rows of a pair are "
                "computed together; make it even"
            )
        if not both and self.learner.loss.average:
            raise ValueError(
                f"learner.loss.average {self.learner.loss.average:g} with orders random: there is one order of a pair; "
                "set orders both, or average 0"
            )
        return self
