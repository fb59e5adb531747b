"""What a learner reads of the config that it works for."""

from typing import Protocol

from rlhf.config.data import Policy
from rlhf.config.learner import Learner
from rlhf.config.system import Rounds


class LearnerJob(Protocol):
    """A run's config, or the like of it: the model, the learner's options, the seed, and the number of rounds."""

    @property
    def policy(self) -> Policy:
        """The model that is trained."""
        ...

    @property
    def learner(self) -> Learner:
        """Options of the learner."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the order within a round."""
        ...

    @property
    def rounds(self) -> Rounds:
        """Their number is what schedules run on."""
        ...
