"""A preference set as a second stream: it holds the policy to the set while rounds bring pairs of their own."""

import hashlib
from collections.abc import Callable

from rlhf.config.offline import Anchor
from rlhf.records import Pair, SealedRound
from rlhf.rounds.ledger import Ledger
from rlhf.rounds.streams import quota


class AnchorStream:
    """The second stream of a round: the next pairs of the set, pass after pass, each in an order of its own."""

    def __init__(self, options: Anchor, encode: Callable[[int, int, int], list[Pair]], ledger: Ledger) -> None:
        """`encode(start, stop, round)` gives the pairs at these places of the endless order, the same ones always."""
        self._options = options
        self._encode = encode
        self._ledger = ledger

    def pairs(self, main: SealedRound) -> SealedRound:
        """The pairs for the round that `main` is of; where they begin follows from the rounds before it."""
        start, stop = quota(self._ledger, main.round, self._options.share)
        pairs = self._encode(start, stop, main.round)
        digest = hashlib.sha256("".join(pair.uid for pair in pairs).encode()).hexdigest()
        return SealedRound(main.round, tuple(pairs), digest, weight=self._options.weight)
