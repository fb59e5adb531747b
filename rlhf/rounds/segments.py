"""The order of an offline training: epochs, each a permutation of its own, cut into segments of equal size."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Passes:
    """Pass after pass over `size` examples, each a permutation of its own, drawn from the seed alone."""

    size: int
    seed: int

    def places(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(place in the whole order, pass, index of the example) of the places [start, stop)."""
        found = []
        for place in range(start, stop):
            epoch, offset = divmod(place, self.size)
            found.append((place, epoch, self._order(epoch)[offset]))
        return found

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            # Places that are asked for together touch few passes, one after the other.
            self._orders.clear()
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.size).tolist()
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, list[int]]:
        return {}


@dataclass(frozen=True)
class Segments:
    """`size` examples over `epochs` epochs, `per_segment` of them in each segment but the last.

    Drawn from the seed alone, so a segment is the same whenever it is asked for.
    """

    size: int
    epochs: int
    per_segment: int
    seed: int

    @property
    def count(self) -> int:
        """Number of segments."""
        return -(-self.size * self.epochs // self.per_segment)

    @property
    def length(self) -> float:
        """Number of segments where one that is not full, the last, counts by what it holds."""
        return self.size * self.epochs / self.per_segment

    def span(self, round: int) -> tuple[float, float]:
        """Fractions of the training at which segment `round` (from 1) starts and ends."""
        return (round - 1) / self.length, min(round / self.length, 1.0)

    def places(self, round: int) -> list[tuple[int, int, int]]:
        """(place in the whole training, epoch, index of the example) of segment `round` (from 1), in order."""
        start = (round - 1) * self.per_segment
        return self._passes.places(start, min(start + self.per_segment, self.size * self.epochs))

    @cached_property
    def _passes(self) -> Passes:
        return Passes(self.size, self.seed)
