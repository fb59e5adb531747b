"""A named subset of the policy's parameters."""

from pydantic import Field

from rlhf.config.base import Section


class Trainable(Section):
    """Which parameters train, by shell patterns over the checkpoint's names; only they get optimizer state.

    `*` stands for any text, dots included, `?` for one character, `[0-3]` for one of a range. Of tied weights either
    name counts.
    """

    include: tuple[str, ...] = Field(
        ("*",), min_length=1, description="Parameters that train (`*.mlp.down_proj.weight`, `*.layers.2?.*`)."
    )
    exclude: tuple[str, ...] = Field((), description="Parameters that do not, though `include` has them.")
