"""Sealed pairs that a disk has damaged or lost, made again from what they were made of.

What is made again has to have the very digest that was sealed: otherwise the file stays as it is, and reading it is an
error.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from rlhf.errors import RLHFError
from rlhf.files import write_atomic
from rlhf.records import Comparison, Pair, Verdict
from rlhf.rounds.ledger import Ledger, RoundState
from rlhf.rounds.sealing import pair_bytes

Rebuild = Callable[[int], Awaitable[Sequence[Pair]]]
"""The pairs of a sealed round once more; raises `RLHFError` where that cannot be done."""


async def mend_sealed(ledger: Ledger, rebuild: Rebuild, alert: Callable[[str], None]) -> None:
    """Make every sealed file again that is not what was sealed; `alert` is told of each, mended or not."""
    for round in ledger.rounds():
        if ledger.state(round) < RoundState.SEALED:
            continue
        path, digest = ledger.folder(round) / "pairs.parquet", ledger.manifest(round)["pairs"]["sha256"]
        if await asyncio.to_thread(file_digest, path) == digest:
            continue
        try:
            data = await asyncio.to_thread(pair_bytes, await rebuild(round))
            if hashlib.sha256(data).hexdigest() != digest:
                raise RLHFError("what they were made of gives another file now (or another version wrote it)")
        except RLHFError as error:
            alert(f"{path}: the sealed pairs of round {round} are damaged, and cannot be made again: {error}")
            continue
        await asyncio.to_thread(write_atomic, path, data)
        alert(f"{path}: the sealed pairs of round {round} were damaged; they have been made again, SHA-256 as sealed")


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file; None if there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, digest: str) -> Path:
    """`path`, if the file is what was written under `digest`; else an `RLHFError` names it."""
    if file_digest(path) != digest:
        raise RLHFError(f"{path} is damaged too, or gone")
    return path


class RecordedJudge:
    """Gives the verdicts of a sealed round once more, in the order in which each comparison was made."""

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self._left: dict[tuple[str, int, int], list[Verdict]] = {}
        for verdict in verdicts:
            self._left.setdefault(_key(verdict.comparison), []).append(verdict)

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """The recorded verdicts. Raises `RLHFError` for a comparison that was not made."""
        found = []
        for comparison in comparisons:
            left = self._left.get(_key(comparison))
            if not left:
                raise RLHFError(f"no verdict on {_key(comparison)} was written down")
            found.append(replace(left.pop(0), comparison=comparison))
        return found


def _key(comparison: Comparison) -> tuple[str, int, int]:
    return comparison.uid, comparison.index_a, comparison.index_b
