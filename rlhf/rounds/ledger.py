"""The ledger: which state each round has reached, one manifest a round, each commit one atomic write.

PLANNED (prompt uids) → SEALED (pairs on disk, hashed) → TRAINED (covered by a checkpoint) → PUBLISHED (on every
generator). There is no way back and no way past a state. Whoever dies, the next process reads the ledger and goes on.
"""

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from rlhf.errors import RLHFError
from rlhf.files import write_json


class RoundState(IntEnum):
    """How far a round has come; ordered."""

    NEW = 0
    PLANNED = 1
    SEALED = 2
    TRAINED = 3
    PUBLISHED = 4


class Ledger:
    """Reads and writes `rounds/NNNN/manifest.json` under a run directory."""

    def __init__(self, run_dir: Path):
        self._rounds = run_dir / "rounds"

    def folder(self, round: int) -> Path:
        """Folder of a round's files, created if missing."""
        path = self._rounds / f"{round:04d}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def manifest(self, round: int) -> dict[str, Any]:
        """What has been committed for a round; empty for a new one. Raises `RLHFError` if it cannot be read."""
        path = self._rounds / f"{round:04d}" / "manifest.json"
        if not path.exists():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            RoundState[manifest["state"]]
            return manifest
        except (ValueError, TypeError, KeyError) as error:
            raise RLHFError(
                f"{path}: the manifest is damaged ({error}); restore it or start over with --fresh"
            ) from error

    def state(self, round: int) -> RoundState:
        """The state of a round."""
        manifest = self.manifest(round)
        return RoundState[manifest["state"]] if manifest else RoundState.NEW

    def plan(self, round: int) -> list[str]:
        """The prompt uids of a planned round; empty for a new one."""
        return list(self.manifest(round).get("uids", []))

    def cursor(self, round: int) -> int:
        """Position in the prompt order at which `round` starts: prompts planned for the rounds before it."""
        if round <= 1:
            return 0
        before = self.manifest(round - 1)
        if not before:
            raise RLHFError(f"{self._rounds}: round {round} cannot be planned before round {round - 1}")
        return int(before["cursor"]) + len(before["uids"])

    def commit(self, round: int, state: RoundState, payload: dict[str, Any]) -> None:
        """Move a round to `state` with `payload` added to its manifest.

        Committing a state that the round has already reached changes nothing, so that a retry is harmless. Skipping
        a state raises `RLHFError`.
        """
        manifest = self.manifest(round)
        current = RoundState[manifest["state"]] if manifest else RoundState.NEW
        if current >= state:
            return
        if current != state - 1:
            raise RLHFError(f"round {round} cannot go from {current.name} to {state.name}")
        write_json(self.folder(round) / "manifest.json", {**manifest, **payload, "round": round, "state": state.name})
