"""The whole config: one YAML file describes a run."""

from pydantic import Field, field_validator, model_validator

from rlhf.config.adapters import check_adapters
from rlhf.config.base import Reserved, Section
from rlhf.config.buffer import Buffer
from rlhf.config.colocate import check_colocate
from rlhf.config.data import Policy, Prompts
from rlhf.config.generator import Generator
from rlhf.config.judge import Judge, SentimentJudge, check_deadline, check_secrets, same_verdicts, with_path
from rlhf.config.learner import ZERO_0_BF16, Learner
from rlhf.config.names import folder_name
from rlhf.config.offline import Anchor
from rlhf.config.pairing import Pairing
from rlhf.config.system import Checkpoint, Cluster, Evaluation, Monitor, Rounds, Sync


class RunConfig(Section):
    """An online-DPO run."""

    name: str = Field(description="Name of the run and of its folder under `output_dir`.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of prompt order, sampling and training.")
    output_dir: str = Field("runs", description="Folder that holds run directories.")
    policy: Policy = Field(description="The model that is trained.")
    prompts: Prompts = Field(description="The prompts the rounds draw from.")
    rounds: Rounds = Field(default_factory=lambda: Rounds(), description="The rounds.")
    generator: Generator = Field(default_factory=lambda: Generator(), description="The generators.")
    judge: Judge = Field(default_factory=lambda: SentimentJudge(), description="The judge the training listens to.")
    eval_judge: Judge | None = Field(
        None, description="A judge the training never sees, for the evaluation; null takes `judge`."
    )
    pairing: Pairing = Field(default_factory=lambda: Pairing(), description="From verdicts to pairs.")
    learner: Learner = Field(default_factory=lambda: Learner(), description="The learner.")
    sync: Sync = Field(default_factory=lambda: Sync(), description="Weight updates.")
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint(), description="Checkpoints.")
    evaluation: Evaluation = Field(default_factory=lambda: Evaluation(), description="Evaluation.")
    monitor: Monitor = Field(default_factory=lambda: Monitor(), description="Monitoring.")
    cluster: Cluster = Field(default_factory=lambda: Cluster(), description="The cluster.")
    preferences: Reserved = Field(
        None, description="Only null here: a file with `preferences` in place of `prompts` is an offline training."
    )
    buffer: Buffer | None = Field(
        None, description="Replay of earlier rounds' pairs beside each round's own; null replays none."
    )
    anchor: Anchor | None = Field(
        None, description="A preference set whose loss is added in every step; null has none."
    )

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        return folder_name(value)

    @model_validator(mode="after")
    def _combinations(self) -> "RunConfig":
        if self.learner.zero_stage == 0 and self.policy.dtype == "bfloat16":
            raise ValueError(ZERO_0_BF16)
        longest = self.prompts.max_tokens + self.generator.sampling.max_tokens
        if longest > self.learner.max_length:
            raise ValueError(
                f"prompts.max_tokens + generator.sampling.max_tokens = {longest} exceeds learner.max_length "
                f"{self.learner.max_length}: such pairs could never be trained; raise it or lower one of the two"
            )
        check_secrets(self.generator.engine, "generator.engine.")
        if self.learner.loss.exploration and self.rounds.lookahead:
            raise ValueError(
                "learner.loss.exploration with rounds.lookahead 1: a round's responses are older than its reference "
                "then; set rounds.lookahead 0, or remove the exploration"
            )
        check_secrets(self.learner.deepspeed, "learner.deepspeed.")
        self._judges()
        if self.sync.transport == "nccl" and self.cluster.device == "cpu":
            raise ValueError("sync.transport nccl needs GPUs; use object_store or auto with cluster.device cpu")
        if self.sync.sparse and (self.sync.transport not in ("auto", "object_store") or self.sync.lora == "adapters"):
            raise ValueError(
                "sync.sparse needs sync.transport object_store (or auto) and sync.lora merged: adapters are small, and "
                "other transports send whole weights; set sync.sparse false, or change the two"
            )
        check_colocate(self)
        if self.generator.replicas.elastic and (strategy := self.cluster.placement.generator.strategy):
            raise ValueError(
                f"cluster.placement.generator.strategy {strategy} with generator.replicas {self.generator.replicas}: "
                "generators that come and go are placed one by one; leave the strategy out"
            )
        if self.sync.lora == "adapters":
            check_adapters(self)
        return self

    def _judges(self) -> None:
        check_deadline(self.judge, "judge", self.cluster.deadlines.judge)
        if self.eval_judge is None:
            return
        check_deadline(self.eval_judge, "eval_judge", self.cluster.deadlines.judge)
        if same_verdicts(with_path(self.eval_judge, self.policy.path), with_path(self.judge, self.policy.path)):
            raise ValueError(
                "eval_judge is the same as judge: the gap between their win rates, which shows over-optimisation, "
                "would always be 0; choose another judge, or leave eval_judge out"
            )
