"""Second streams: pairs that are trained beside each round's own."""

from collections.abc import Mapping

from rlhf.ports import PairSource, SecondStream
from rlhf.records import SealedRound
from rlhf.rounds.ledger import Ledger


class WithStreams:
    """A pair source with second streams beside its own."""

    def __init__(self, source: PairSource, others: Mapping[str, SecondStream]) -> None:
        self._source = source
        self._others = dict(others)

    async def streams(self, round: int) -> Mapping[str, SealedRound]:
        """The source's streams, its own first, and the second ones by name."""
        found = dict(await self._source.streams(round))
        main = next(iter(found.values()))
        return found | {name: other.pairs(main) for name, other in self._others.items()}

    def metrics(self, round: int) -> tuple[dict[str, float], list[str]]:
        """The source's."""
        return self._source.metrics(round)


def with_streams(source: PairSource, others: Mapping[str, SecondStream]) -> PairSource:
    """`source` with the second streams `others`, if there are any."""
    return WithStreams(source, others) if others else source


def quota(ledger: Ledger, round: int, share: float) -> tuple[int, int]:
    """The places [start, stop) of a sealed round in a stream that brings `share` pairs for each pair of all rounds.

    They follow from the rounds' pair counts in the ledger, so that a resume finds the same; shares of a pair add up
    over rounds instead of being lost.
    """
    before = sum(int(ledger.manifest(earlier)["pairs"]["count"]) for earlier in range(1, round))
    count = int(ledger.manifest(round)["pairs"]["count"])
    return int(share * before), int(share * (before + count))
