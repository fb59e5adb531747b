"""vLLM generators: how many, how they sample, and vLLM's own arguments."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_serializer, model_validator

from rlhf.config.base import Section


class Sampling(Section):
    """Sampling of the K responses."""

    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass.")
    max_tokens: int = Field(
        48, ge=1, description="Longest response, in tokens; a longer one is truncated and gets no end token."
    )


class Replicas(Section):
    """How many generators: a number, or a range within which they come and go with the cluster's nodes."""

    min: int = Field(
        1, ge=1, description="Generators that the run starts with; with fewer it goes on, and waits for others."
    )
    max: int = Field(
        ge=1,
        description="Generators that are asked for once the run has started (a local cluster, one machine, has `min`). "
        "Each joins when a node has room for it and it has proved the version that is served; one whose node "
        "is drained gets no new prompts, ends what it is sampling within the node's notice, and leaves.",
    )

    @model_validator(mode="after")
    def _range(self) -> "Replicas":
        if self.max < self.min:
            raise ValueError(f"max {self.max} is less than min {self.min}")
        return self

    @property
    def elastic(self) -> bool:
        """Do they come and go?"""
        return self.min < self.max

    def most(self, private: bool) -> int:
        """How many there can be: a cluster that is private to the run is one machine, which gets no nodes."""
        return self.min if private else self.max

    @model_serializer
    def _short(self) -> int | dict[str, int]:
        return {"min": self.min, "max": self.max} if self.elastic else self.min

    def __str__(self) -> str:
        return f"{self.min}-{self.max}" if self.elastic else str(self.min)


def _replicas(value: Any) -> Any:
    """A number stands for a range of one."""
    if isinstance(value, dict | Replicas):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("expected a number of generators, or a mapping of min and max")
    return {"min": value, "max": value}


class Generator(Section):
    """The generator fleet."""

    replicas: Annotated[Replicas, BeforeValidator(_replicas, json_schema_input_type=int | Replicas)] = Field(
        default_factory=lambda: Replicas(min=1, max=1),
        description="vLLM engines, each in its own Ray actor: a number, or `{min: 2, max: 8}` where nodes come and go.",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs (or CPU workers) of one engine.")
    samples: int = Field(4, description="K, the responses sampled for each prompt; at least 2.")
    sampling: Sampling = Field(default_factory=lambda: Sampling(), description="Sampling parameters.")
    engine: dict[str, Any] = Field(default_factory=dict, description="Passed to vLLM's engine arguments as they are.")
    cpus: int | None = Field(
        None,
        ge=1,
        description="CPU threads of one engine; null takes every core of a local machine without a GPU, else 4.",
    )

    @field_validator("samples")
    @classmethod
    def _two_or_more(cls, value: int) -> int:
        if value < 2:
            raise ValueError("a preference needs at least 2 responses a prompt")
        return value
