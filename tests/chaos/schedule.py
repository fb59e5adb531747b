"""Which fault comes when: a pure function of a seed.

Faults are dealt from shuffled decks that hold every kind once, moments from decks that hold every moment once, so that
any run of a deck's length has them all, in an order and in combinations that the seed draws.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")


class Kind(StrEnum):
    """What happens. All but FULL_DISK are or begin with a SIGKILL."""

    GENERATOR = "generator actor"
    ENGINE = "engine process"
    JUDGE = "judge actor"
    LEARNER_0 = "learner rank 0"
    LEARNER_1 = "learner rank 1"
    CONTROLLER = "controller"
    RAYLET = "raylet"
    NODE = "node"
    FULL_DISK = "full disk"
    TRUNCATED_CHECKPOINT = "truncated checkpoint"
    FLIPPED_SHARD = "flipped byte in a shard"
    FLIPPED_SEALED = "flipped byte in a sealed file"
    RELAY = "relay"


UNRELAYED = tuple(kind for kind in Kind if kind != Kind.RELAY)
"""What can happen to a fleet that is called directly."""


class Moment(StrEnum):
    """What the run is doing then. RECOVERING is soon after the fault before, whatever that has brought."""

    PLANNED = "planned"
    SAMPLING = "sampling"
    JUDGING = "judging"
    SEALED = "sealed"
    TRAINING = "training"
    PUBLISHING = "publishing"
    SAVING = "saving"
    RECOVERING = "recovering"


DAMAGES = frozenset({Kind.TRUNCATED_CHECKPOINT, Kind.FLIPPED_SHARD, Kind.FLIPPED_SEALED})
"""The controller is killed, and a file damaged before it is started again."""

DELAY_S = {
    Moment.PLANNED: 0.03,
    Moment.SAMPLING: 0.3,
    Moment.JUDGING: 0.2,
    Moment.SEALED: 0.2,
    Moment.TRAINING: 0.3,
    Moment.PUBLISHING: 0.5,
    Moment.SAVING: 0.3,
    Moment.RECOVERING: 15.0,
}
"""The longest delay into a moment, in seconds: about as long as it lasts on the tiny model."""


@dataclass(frozen=True)
class Fault:
    """`delay_s` after `moment` is seen in `round` or a later one, `kind` happens; `choice`, in [0, 1), says to whom."""

    kind: Kind
    moment: Moment
    round: int
    delay_s: float
    choice: float


def schedule(seed: int, count: int, kinds: Sequence[Kind] = UNRELAYED) -> tuple[Fault, ...]:
    """`count` faults of `kinds`, one to each round from the first on."""
    rng = random.Random(seed)
    dealt = zip(range(1, count + 1), _decks(kinds, rng), _decks(tuple(Moment), rng), strict=False)
    return tuple(
        Fault(kind, moment, round, rng.uniform(0, DELAY_S[moment]), rng.random()) for round, kind, moment in dealt
    )


def _decks(cards: Sequence[T], rng: random.Random) -> Iterator[T]:
    """One shuffled deck after another."""
    return itertools.chain.from_iterable(rng.sample(cards, len(cards)) for _ in itertools.count())
