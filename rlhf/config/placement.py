"""Which nodes the actors of each role go to."""

from typing import Literal

from pydantic import Field, model_validator

from rlhf.config.base import Section

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class RolePlacement(Section):
    """Where the actors of one role go."""

    strategy: Strategy | None = Field(
        None,
        description="Ray's placement strategy over a role's actors: on few nodes or on many, as far as possible or "
        "strictly. null: PACK for generators and learner, SPREAD for judges. One actor, with all its GPUs, is always "
        "on one node.",
    )
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="Custom resources that each actor takes besides CPUs and GPUs, as nodes announce them.",
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Labels of the nodes that may hold an actor, in Ray's selector syntax (ray.io/accelerator-type: "
        "H100, or in(H100, H200), or !spot).",
    )

    @model_validator(mode="after")
    def _amounts(self) -> "RolePlacement":
        for name, amount in self.resources.items():
            if name in ("CPU", "GPU", "memory"):
                raise ValueError(
                    f"resources.{name} {amount:g}: set the role's cpus, tensor_parallel or world_size instead; here "
                    "are custom resources only"
                )
            if amount <= 0:
                raise ValueError(f"resources.{name} {amount:g}: expected more than 0")
        return self


class Placement(Section):
    """Placement by role."""

    generator: RolePlacement = Field(default_factory=lambda: RolePlacement(), description="Generators.")
    judge: RolePlacement = Field(default_factory=lambda: RolePlacement(), description="Judges, every pool of them.")
    learner: RolePlacement = Field(default_factory=lambda: RolePlacement(), description="The learner's ranks.")
