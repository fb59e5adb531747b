"""Checkpoint folders that exist whole or not at all, with a manifest that tells a damaged one."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash

from rlhf.errors import RLHFError
from rlhf.files import rename_durable, sync_file, sync_folder, write_json, writing

MANIFEST = "manifest.json"


class CheckpointStore:
    """`checkpoints/round-NNNN` folders of a run directory."""

    def __init__(self, run_dir: Path, keep: int):
        self._root = run_dir / "checkpoints"
        self._keep = keep

    def path(self, round: int) -> Path:
        """Folder of a round's checkpoint."""
        return self._root / f"round-{round:04d}"

    def stage(self, round: int) -> Path:
        """An empty folder to write a checkpoint into; leftovers of tries that did not end are removed."""
        self._sweep()
        staging = self._root / f"round-{round:04d}.tmp"
        with writing(staging):
            staging.mkdir(parents=True)
        return staging

    def commit(self, round: int) -> None:
        """Hash and flush what was written, put it in place and remove checkpoints over the number kept."""
        staging = self._root / f"round-{round:04d}.tmp"
        with writing(staging):
            self._put_in_place(round, staging)

    def _put_in_place(self, round: int, staging: Path) -> None:
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        if not files:
            raise RLHFError(f"{staging}: the learner wrote nothing there; output_dir must be a folder all nodes share")
        for path in files:
            sync_file(path)
        table = {
            str(path.relative_to(staging)): {"bytes": path.stat().st_size, "xxh3": _digest(path)} for path in files
        }
        write_json(staging / MANIFEST, {"round": round, "files": table})
        for folder in {path.parent for path in files}:
            sync_folder(folder)
        shutil.rmtree(self.path(round), ignore_errors=True)
        rename_durable(staging, self.path(round))
        for old in self.rounds()[: -self._keep]:
            shutil.rmtree(self.path(old))

    def rounds(self) -> list[int]:
        """Rounds with a checkpoint in place, oldest first."""
        if not self._root.exists():
            return []
        names = (path.name for path in self._root.iterdir() if path.is_dir() and not path.name.endswith(".tmp"))
        return sorted(int(name.removeprefix("round-")) for name in names if name.startswith("round-"))

    def newest(self, warn: Callable[[str], None]) -> int:
        """The newest round whose checkpoint is whole, 0 if there is none; damaged ones are named by `warn`.

        What tries that did not end have left is removed: after one that found the disk full, its room is needed.
        """
        self._sweep()
        for round in reversed(self.rounds()):
            problem = self.problem(round)
            if problem is None:
                return round
            warn(f"{self.path(round)}: {problem}; going back to the checkpoint before it")
        return 0

    def _sweep(self) -> None:
        for leftover in self._root.glob("round-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def problem(self, round: int) -> str | None:
        """What is wrong with a checkpoint, None if every file is there with the bytes that were written."""
        folder = self.path(round)
        try:
            table = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            files = [(name, entry["bytes"], entry["xxh3"]) for name, entry in table.items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "the checkpoint has no readable manifest"
        for name, nbytes, digest in files:
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != nbytes:
                return f"{name} has {path.stat().st_size} bytes, {nbytes} were written"
            if _digest(path) != digest:
                return f"{name} is damaged (checksum)"
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        # In small steps through one buffer: the C library keeps large ones for each thread that ever had some.
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
