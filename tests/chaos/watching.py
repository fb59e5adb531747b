"""What a run is doing, read from its directory while it runs."""

import json
import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.schedule import Moment

SEALED = ("SEALED", "TRAINED", "PUBLISHED")


@dataclass(frozen=True)
class View:
    """A moment of a run: the newest planned round, what is going on, and the steps that metrics.jsonl has."""

    round: int = 0
    moments: frozenset[Moment] = frozenset()
    steps: int = 0


@dataclass
class Watch:
    """Looks at a run directory; `batch` is pairs a step, `note` the file that the judge touches."""

    run_dir: Path
    batch: int
    note: Path
    sealed: dict[int, str] = field(default_factory=dict)
    """By round, the digest under which its pairs were sealed when that was seen first."""

    def look(self) -> View:
        """What is there now; files are read as a crash would leave them."""
        rounds = self._manifests()
        events = Counter((event["event"], event["round"]) for event in self._events())
        newest = max(rounds, default=0)
        moments = self._sampling(newest, rounds.get(newest, {}))
        # The round that is or will be trained next; after a loss an older one than the newest.
        training = 1 + max((round for kind, round in events if kind == "round"), default=0)
        moments |= self._training(rounds.get(training, {}), events["step", training])
        if any(self.run_dir.glob("checkpoints/round-*.tmp")):
            moments.add(Moment.SAVING)
        return View(newest, frozenset(moments), sum(n for (kind, _), n in events.items() if kind == "step"))

    def _sampling(self, round: int, manifest: dict[str, Any]) -> set[Moment]:
        if manifest.get("state") != "PLANNED":
            return set()
        planned = (self.run_dir / "rounds" / f"{round:04d}" / "manifest.json").stat().st_mtime
        if self.note.exists() and self.note.stat().st_mtime > planned:
            return {Moment.JUDGING}
        return {Moment.PLANNED, Moment.SAMPLING}

    def _training(self, manifest: dict[str, Any], steps: int) -> set[Moment]:
        if manifest.get("state") not in SEALED:
            return set()
        expected = math.ceil(manifest["pairs"]["count"] / self.batch)
        if steps < expected:
            return {Moment.TRAINING} if steps else {Moment.SEALED}
        return {Moment.PUBLISHING}

    def _manifests(self) -> dict[int, dict[str, Any]]:
        found = {}
        for path in self.run_dir.glob("rounds/*/manifest.json"):
            with suppress(FileNotFoundError):
                found[int(path.parent.name)] = json.loads(path.read_text())
        for round, manifest in found.items():
            if manifest["state"] in SEALED:
                self.sealed.setdefault(round, manifest["pairs"]["sha256"])
        return found

    def _events(self) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            lines = (self.run_dir / "metrics.jsonl").read_text().split("\n")
            return [json.loads(line) for line in lines[:-1]]
        return []
