"""Rounds whose pairs come from a preference set and not from sampling: the same loop, ledger and checkpoints."""

import asyncio
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf.config.data import Policy
from rlhf.config.learner import Learner
from rlhf.config.system import Checkpoint, Rounds
from rlhf.errors import InputError
from rlhf.records import Pair, SealedRound, SyncReport, WeightManifest
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.resume_sealed import mend_sealed
from rlhf.rounds.sealing import read_sealed, seal_pairs


@dataclass(frozen=True)
class OfflineJob:
    """What learner and loop read of an offline training's config; a round is a segment of the data."""

    policy: Policy
    learner: Learner
    seed: int
    rounds: Rounds
    checkpoint: Checkpoint


class OfflineSource:
    """Seals segment r of the data as round r, in training order."""

    def __init__(
        self,
        segment: Callable[[int], tuple[list[Pair], int]],
        ledger: Ledger,
        data: str,
        group: int = 1,
        alert: Callable[[str], None] = warnings.warn,
        span: Callable[[int], tuple[float, float] | None] = lambda round: None,
    ) -> None:
        """`segment(round)` gives the same pairs whenever it is asked, and how many of the data were unusable.

        `data` names them in an error. Each `group` neighbours are trained in one micro-batch. `alert` is told of sealed
        files that were damaged. `span(round)` is which part of the run the segment is, see `SealedRound`.
        """
        self._span = span
        self._alert = alert
        self._mended = False
        self._group = group
        self._segment = segment
        self._ledger = ledger
        self._data = data

    async def streams(self, round: int) -> Mapping[str, SealedRound]:
        """The round's pairs, sealed now unless they are on disk already; what is damaged there is made again first."""
        if not self._mended:
            await mend_sealed(self._ledger, self.rebuild, self._alert)
            self._mended = True
        folder = self._ledger.folder(round)
        if self._ledger.state(round) < RoundState.SEALED:
            pairs, unusable = await asyncio.to_thread(self._segment, round)
            uids = [pair.uid for pair in pairs]
            planned = self._ledger.plan(round)
            if planned and planned != uids:
                raise InputError(
                    f"{self._data}: not the data that segment {round} was planned with; restore it, or start over with "
                    "--fresh"
                )
            self._ledger.commit(round, RoundState.PLANNED, {"uids": uids, "cursor": 0})
            digest = await asyncio.to_thread(seal_pairs, folder / "pairs.parquet", pairs)
            payload = {"sha256": digest, "count": len(pairs), "unusable": unusable}
            self._ledger.commit(round, RoundState.SEALED, {"pairs": payload})
        digest = self._ledger.manifest(round)["pairs"]["sha256"]
        sealed = read_sealed(folder / "pairs.parquet", round, digest)
        return {"offline": replace(sealed, ordered=True, group=self._group, span=self._span(round))}

    async def rebuild(self, round: int) -> list[Pair]:
        """The pairs of a sealed round, taken from the data again."""
        return (await asyncio.to_thread(self._segment, round))[0]

    def metrics(self, round: int) -> tuple[dict[str, float], list[str]]:
        """How many pairs the segment holds, and how many could not be used."""
        sealed = self._ledger.manifest(round)["pairs"]
        return {"pairs/kept": float(sealed["count"]), "pairs/dropped_invalid": float(sealed["unusable"])}, []


class NoFleet:
    """The `Fleet` and `WeightPlane` ports where nothing samples."""

    def members(self) -> list[str]:
        """None."""
        return []

    async def admit(self, member: str, version: int) -> None:
        """Nobody can be admitted."""
        raise LookupError(member)

    async def suspend(self, member: str) -> None:
        """Nobody is there."""

    async def publish(self, manifest: WeightManifest, targets: Sequence[str]) -> SyncReport:
        """Nothing is sent."""
        return SyncReport(manifest.version, 0.0, 0, (), {}, 0.0)
