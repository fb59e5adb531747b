"""The replay buffer: pairs of earlier rounds, read back from where they were sealed."""

import hashlib
from typing import Any

import numpy as np

from rlhf.config.buffer import Buffer
from rlhf.records import Pair, SealedRound
from rlhf.rounds.ledger import Ledger
from rlhf.rounds.sealing import read_sealed
from rlhf.rounds.streams import quota
from rlhf.seeds import derive_seed


class ReplayBuffer:
    """The second stream of a round: pairs drawn from the newest `size` of the rounds before it, none twice.

    What it holds follows from the sealed rounds on disk and what it draws from (seed, round), so that a resume goes on
    exactly. Nothing but ids is replayed: the learner scores the pairs under the round's own reference.
    """

    def __init__(self, options: Buffer, ledger: Ledger, seed: int) -> None:
        self._options = options
        self._ledger = ledger
        self._seed = seed
        self._rounds: dict[int, SealedRound] = {}

    def pairs(self, main: SealedRound) -> SealedRound:
        """Pairs for the round that `main` is of: as many as its share asks for, or all that are held.

        Raises `RLHFError` if a sealed file is missing or has changed.
        """
        start, stop = quota(self._ledger, main.round, self._options.share)
        held = self.held(main.round)
        draw = np.random.default_rng(derive_seed(self._seed, "replay", main.round))
        chosen = sorted(draw.permutation(len(held))[: stop - start].tolist())
        digests = "".join(self._rounds[round].digest for round in sorted(self._rounds))
        digest = hashlib.sha256(f"{digests}{chosen}".encode()).hexdigest()
        return SealedRound(main.round, tuple(held[i] for i in chosen), digest, weight=self._options.weight)

    def held(self, round: int) -> list[Pair]:
        """What the buffer holds when `round` trains, oldest first; of the oldest round only the last pairs that fit."""
        kept: dict[int, SealedRound] = {}
        found: list[Pair] = []
        for earlier in range(round - 1, 0, -1):
            if len(found) >= self._options.size:
                break
            kept[earlier] = self._rounds.get(earlier) or self._read(earlier)
            found = [*kept[earlier].pairs, *found]
        self._rounds = kept
        return found[-self._options.size :]

    def state_dict(self) -> dict[str, Any]:
        """The rounds that are held, with the digests that they were sealed under."""
        return {"rounds": {round: sealed.digest for round, sealed in self._rounds.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state`; the pairs are read from their sealed files. Raises `RLHFError` if one is not what it was."""
        self._rounds = {int(round): self._read(int(round), digest) for round, digest in state["rounds"].items()}

    def _read(self, round: int, digest: str | None = None) -> SealedRound:
        digest = digest or self._ledger.manifest(round)["pairs"]["sha256"]
        return read_sealed(self._ledger.folder(round) / "pairs.parquet", round, digest)
