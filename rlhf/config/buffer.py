"""The replay buffer."""

from pydantic import Field

from rlhf.config.base import Section


class Buffer(Section):
    """Pairs of earlier rounds that are trained again beside each round's own, against the round's reference."""

    size: int = Field(1024, ge=1, description="Pairs held: those of the newest rounds before the one that trains.")
    share: float = Field(
        0.25, gt=0, le=1, description="Replayed pairs of a step, as a fraction of its own pairs, and beside them."
    )
    weight: float = Field(1.0, ge=0, description="Weight of their mean loss in the step's; 0 replays nothing.")
