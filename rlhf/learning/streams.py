"""Streams of pairs beside a round's own: what each step takes of them, and which of a micro-batch's pairs are whose."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rlhf.errors import RLHFError
from rlhf.learning.plan import drop_long
from rlhf.records import Pair, SealedRound
from rlhf.seeds import derive_seed

MAIN = ""
"""Name of the round's own stream, whose metrics are the step's."""


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs of one stream with their reference log-probs, float32 [n, 2]: of a whole round, or of one step.

    Their mean loss counts with `weight`. `reference_version` is the reference's, where it has one that can have
    written responses of this stream.
    """

    name: str
    pairs: Sequence[Pair]
    reference: torch.Tensor
    weight: float = 1.0
    reference_version: int | None = None

    def take(self, indices: Sequence[int]) -> "Part":
        """These pairs only."""
        rows = list(indices)
        return replace(self, pairs=[self.pairs[row] for row in rows], reference=self.reference[rows])


@dataclass(frozen=True, slots=True)
class Streams:
    """All pairs of a round: its own and those of the other streams, what is too long left out."""

    main: Part
    others: tuple[tuple[Part, SealedRound], ...]
    dropped: int

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of all streams."""
        return [pair for part in (self.main, *(part for part, _ in self.others)) for pair in part.pairs]

    @classmethod
    def read(
        cls,
        sealed: SealedRound,
        others: Mapping[str, SealedRound],
        max_length: int,
        score: Callable[[Sequence[Pair]], torch.Tensor],
    ) -> "Streams":
        """Drop what is longer than `max_length` and `score` the rest under the reference, all streams at once.

        A stream of weight 0 is left out, and so are all others where the round has no pair and takes no step.
        Raises `InputError` for a pair without tokens.
        """
        main, dropped = drop_long(sealed.pairs, max_length)
        kept = [(MAIN, sealed, main)]
        for name, other in others.items() if main else ():
            if not other.weight:
                continue
            if other.group != 1 or sealed.group != 1:
                raise RLHFError(f"round {sealed.round}: the stream {name} cannot be trained beside pairs in groups")
            pairs, long = drop_long(other.pairs, max_length)
            kept.append((name, other, pairs))
            dropped += long
        scores = score([pair for _, _, pairs in kept for pair in pairs]) if main else torch.zeros(0, 2)
        split = scores.split([len(pairs) for _, _, pairs in kept])
        first, *rest = (
            Part(name, pairs, own, stream.weight) for (name, stream, pairs), own in zip(kept, split, strict=True)
        )
        return cls(first, tuple(zip(rest, (stream for _, stream, _ in kept[1:]), strict=True)), dropped)

    def shares(self, sizes: Sequence[int], seed: int) -> Iterator[list[Part]]:
        """What each step takes of the other streams; `sizes` are the steps' pairs of the main stream, all epochs.

        A stream is gone through once an epoch, as evenly as the main one, in an order of its own drawn from
        (seed, round, stream, epoch), or as it comes where it is `ordered`.
        """
        whole = len(self.main.pairs)
        taken = 0
        for size in sizes:
            epoch, start = divmod(taken, whole)
            parts = []
            for part, sealed in self.others:
                count = len(part.pairs)
                order = list(range(count))
                if not sealed.ordered:
                    own = derive_seed(seed, "stream", sealed.round, part.name, epoch)
                    order = np.random.default_rng(own).permutation(count).tolist()
                parts.append(part.take(order[count * start // whole : count * (start + size) // whole]))
            yield [part for part in parts if part.pairs]
            taken += size


def split(parts: Sequence[Part], micro: Sequence[int]) -> Iterator[tuple[int, list[int] | slice, list[int]]]:
    """Whose pairs are in a micro-batch of indices into all parts' pairs, one part after the other.

    Yields the number of each part that has any, their places in the micro-batch, and their indices in the part.
    """
    if len(parts) == 1:
        yield 0, slice(None), list(micro)
        return
    start = 0
    for number, part in enumerate(parts):
        places = [place for place, index in enumerate(micro) if start <= index < start + len(part.pairs)]
        if places:
            yield number, places, [micro[place] - start for place in places]
        start += len(part.pairs)


def stream_metrics(
    name: str, means: Mapping[str, float], count: int, accuracy: bool = True
) -> Iterable[tuple[str, float]]:
    """What is reported of a stream beside the main one; its `accuracy` where rejected responses are computed."""
    yield f"{name}/loss", means["loss"]
    if accuracy:
        yield f"{name}/rewards/accuracies", means["rewards/accuracies"]
    yield f"{name}/pairs", float(count)
