"""Rounds, weight sync, checkpoints, evaluation, monitoring and the cluster."""

import re
from typing import Literal

from pydantic import Field, model_validator

from rlhf.config.base import Section
from rlhf.config.placement import Placement


class Rounds(Section):
    """How much work, and how far sampling may run ahead of training."""

    count: int = Field(8, ge=1, description="Rounds of sample, judge, train, publish.")
    prompts: int = Field(32, ge=1, description="Prompts a round.")
    lookahead: Literal[0, 1] = Field(0, description="Rounds that sampling may run ahead of training; 0 is synchronous.")
    max_staleness: int = Field(
        1,
        ge=0,
        description="A round is not sampled when its responses would be more versions old than this at training.",
    )

    @model_validator(mode="after")
    def _staleness(self) -> "Rounds":
        if self.lookahead > self.max_staleness:
            raise ValueError(
                f"rounds.lookahead {self.lookahead} makes pairs staler than rounds.max_staleness {self.max_staleness} "
                "allows; raise it or set rounds.lookahead 0"
            )
        return self


class Sync(Section):
    """How new weights reach the generators."""

    transport: Literal["auto", "object_store", "nccl", "ipc"] = Field(
        "auto",
        description="object_store works anywhere; nccl needs learner and generators on separate GPUs, ipc on the same "
        "ones (cluster.colocate); auto picks one of the two on GPUs and object_store elsewhere.",
    )
    sparse: bool = Field(
        False,
        description="Send the 16-bit words that changed since the version before, a few percent of them in bfloat16; "
        "each node patches a copy of its own, which its engines map. Goes through the object store; pays where nodes "
        "are joined by a slow network.",
    )
    refresh_every: int = Field(16, ge=1, description="With sparse, versions between whole payloads.")
    lora: Literal["merged", "adapters"] = Field(
        "merged",
        description="With learner.lora, what is sent. merged: all weights, with the adapters merged in fp32. adapters: "
        "the adapters alone, megabytes in place of gigabytes; vLLM serves them beside the base weights, which slows "
        "sampling, on a CPU a great deal. They go through the object store, have no modules_to_save "
        "and a rank of 512 at most, and on GPUs policy.dtype is bfloat16.",
    )
    verify: bool = Field(
        True, description="Checksum the payload and probe the engine's log-probs before a version serves."
    )
    bucket_mb: int = Field(256, ge=1, description="Size of one packed weight buffer, in MiB.")
    probe_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest mean of |log-prob difference| / max(1, |log-prob|) of a probe; null: 1e-4 in float32, "
        "0.1 in bfloat16.",
    )


class Checkpoint(Section):
    """Saved state of the learner."""

    every: int = Field(
        1,
        ge=1,
        description="Rounds between checkpoints; rounds in between are replayed from their sealed pairs on resume.",
    )
    keep: int = Field(2, ge=1, description="Checkpoints kept.")


class Evaluation(Section):
    """Win rate against the round-0 policy on held-out prompts."""

    every: int = Field(
        4, ge=0, description="Rounds between evaluations; the last round is always evaluated; 0 turns it off."
    )
    samples: int = Field(4, ge=1, description="Responses per held-out prompt.")


class Wandb(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = Field(
        "disabled", description="W&B mode; the key comes from the environment only."
    )
    project: str = Field("rlhf", description="W&B project.")
    entity: str | None = Field(None, description="W&B team or user.")
    group: str | None = Field(None, description="W&B group.")
    tags: tuple[str, ...] = Field((), description="W&B tags.")


class Monitor(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Wandb = Field(default_factory=lambda: Wandb(), description="Weights & Biases.")
    tensorboard: bool = Field(False, description="Write TensorBoard event files to the run directory.")
    samples: int = Field(4, ge=0, description="Sample responses shown after an evaluation.")


class Deadlines(Section):
    """Seconds after which a wait fails and names what it waited for."""

    start: float = Field(900, gt=0, description="Placing and starting one actor, its model loaded.")
    generate: float = Field(3600, gt=0, description="All responses of a round.")
    token: float = Field(
        300,
        gt=0,
        description="A generator that has work and gives no token for so long is replaced; its prompts go to others.",
    )
    judge: float = Field(
        1800, gt=0, description="One batch of comparisons; the actor is replaced, another one gets the batch."
    )
    learn: float = Field(
        7200,
        gt=0,
        description="All steps of a round. A learner that is past this deadline, or past that of a sync or a "
        "checkpoint, hangs and is started again.",
    )
    sync: float = Field(600, gt=0, description="One weight update on all generators.")
    checkpoint: float = Field(1800, gt=0, description="Writing or reading a checkpoint.")


class Restarts(Section):
    """How often generators, judges and the learner are started again when they died or give nothing any more."""

    budget: int = Field(
        5,
        ge=0,
        description="Restarts within any `window_s`, over all generators and judges and the learner, whose ranks "
        "count as one; who dies when it is spent is not replaced, and the run ends when no generator, no actor of a "
        "judge, or no learner is left. Between two checkpoints the learner gets no more than these however long they "
        "take.",
    )
    window_s: float = Field(3600, gt=0, description="Length of the window, in seconds.")


class Cluster(Section):
    """Where the actors run."""

    address: str = Field(
        "local",
        description="local starts a private Ray on this machine; auto joins the one this process runs in; or an "
        "address.",
    )
    colocate: bool = Field(
        False,
        description="Generators, vLLM judges and learner take turns on the same GPUs: each GPU holds one of a kind, "
        "and who has no turn sleeps, its memory given back. On a CPU they take the same turns. Needs "
        "rounds.lookahead 0.",
    )
    placement: Placement = Field(
        default_factory=lambda: Placement(),
        description="Which nodes the actors of each role go to; a local cluster is one node and needs none of it.",
    )
    grows: bool = Field(
        False,
        description="An autoscaler may add nodes: what does not fit now is waited for, up to deadlines.start, and said "
        "every 10 seconds. Without it a run that cannot fit stops at once.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where a node has a GPU.")
    deadlines: Deadlines = Field(default_factory=lambda: Deadlines(), description="Deadlines, in seconds.")
    restarts: Restarts = Field(default_factory=lambda: Restarts(), description="Restarts of actors, and their budget.")
    temp_dir: str | None = Field(
        None,
        description="Ray's folder for sockets and logs of a local cluster; must be short. Null takes a fresh one under "
        "the system's temp folder.",
    )
    shared: tuple[str, ...] = Field(
        (),
        description="Folders that every node has under the same path (a mounted volume, NFS). `rlhf submit` refuses a "
        "path that this machine has outside of them, since the cluster's nodes would not.",
    )
    env: tuple[str, ...] = Field(
        (),
        description="Names of environment variables that the run needs, such as WANDB_API_KEY: every node has them in "
        "its own environment (a Kubernetes secret, Slurm's export), and a run stops at its start if its driver does "
        "not. Values are never sent.",
    )

    @model_validator(mode="after")
    def _names_and_folders(self) -> "Cluster":
        for index, name in enumerate(self.env):
            # The text is not shown: it may be NAME=secret.
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"cluster.env.{index}: expected the name of an environment variable (letters, digits, _) without "
                    "its value"
                )
        for index, folder in enumerate(self.shared):
            if not folder.startswith("/"):
                raise ValueError(
                    f"cluster.shared.{index} {folder!r}: expected an absolute path, the same on every node"
                )
        return self
