"""vLLM generators: how many, how they sample, and vLLM's own arguments."""

from typing import Any

from pydantic import Field, field_validator

from rlhf.config.base import Section


class Sampling(Section):
    """Sampling of the K responses."""

    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass.")
    max_tokens: int = Field(
        48, ge=1, description="Longest response, in tokens; a longer one is truncated and gets no end token."
    )


class Generator(Section):
    """The generator fleet."""

    replicas: int = Field(1, ge=1, description="vLLM engines, each in its own Ray actor.")
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
