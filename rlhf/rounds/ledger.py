"""The ledger: which state each round has reached, one manifest a round, each commit one atomic write.

PLANNED (prompt uids) → SEALED (pairs on disk, hashed) → TRAINED (covered by a checkpoint) → PUBLISHED (on every
generator). There is no way back and no way past a state. Whoever dies, the next process reads the ledger and goes on.
"""

import json
import os
import shutil
from collections import OrderedDict
from enum import IntEnum
from pathlib import Path
from typing import Any

import xxhash

from rlhf.errors import RLHFError
from rlhf.files import rename_durable, write_atomic, writing

MANIFEST, BEFORE = "manifest.json", "manifest.before.json"

KNOWN = 4
"""Manifests that are kept parsed: those of the rounds under way, and of one before them."""


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
        self._known: OrderedDict[int, tuple[bytes, dict[str, Any]]] = OrderedDict()

    def folder(self, round: int) -> Path:
        """Folder of a round's files, created if missing."""
        path = self._rounds / f"{round:04d}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def manifest(self, round: int) -> dict[str, Any]:
        """What has been committed for a round; empty for a new one. Raises `RLHFError` if it cannot be read."""
        path = self._rounds / f"{round:04d}" / MANIFEST
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return {}
        known = self._known.get(round)
        # A round is looked at ten times: parsing a hundred thousand uids takes much longer than reading them.
        if known is None or known[0] != data:
            try:
                known = data, _parse(data)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise RLHFError(
                    f"{path}: the manifest is damaged ({error}); restore it or start over with --fresh"
                ) from error
            self._remember(round, known)
        return dict(known[1])

    def rounds(self) -> list[int]:
        """Rounds that have a folder, in order."""
        return sorted(int(path.name) for path in self._rounds.glob("*") if path.name.isdigit())

    def mend(self) -> list[str]:
        """Take the state before in place of a manifest that is damaged; returns a line for each.

        What has been lost of the state is done again or follows from the checkpoints, so that nothing is trained twice.
        The newest round's first manifest is set aside: the round is planned again, as it was. Another that has no
        state before it stays as it is.
        """
        told = []
        rounds = self.rounds()
        for round in rounds:
            path, before = (self._rounds / f"{round:04d}" / name for name in (MANIFEST, BEFORE))
            if _whole(path) or not (path.exists() or before.exists()):
                continue
            if _whole(before):
                write_atomic(path, before.read_bytes())
                told.append(
                    f"{path}: damaged or gone; goes on from the state before, {_parse(path.read_bytes())['state']}"
                )
            elif round == rounds[-1] and not before.exists():
                rename_durable(path, path.with_name("manifest.damaged.json"))
                told.append(f"{path}: damaged; round {round} is planned again")
        return told

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
        # As it will be read, where keys that are numbers have become text.
        payload = json.loads(json.dumps(payload))
        content = {**manifest, **payload, "round": round, "state": state.name}
        path = self.folder(round) / MANIFEST
        _keep(path)
        data = _text({**content, "check": _check(content)}).encode()
        write_atomic(path, data)
        self._remember(round, (data, content))

    def _remember(self, round: int, known: tuple[bytes, dict[str, Any]]) -> None:
        self._known[round] = known
        self._known.move_to_end(round)
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)


def _keep(path: Path) -> None:
    """Keep the manifest as it is under its other name: a link, since the new one will be another file."""
    if not path.exists():
        return
    before = path.with_name(BEFORE)
    with writing(before):
        before.unlink(missing_ok=True)
        try:
            os.link(path, before)
        except OSError:  # a file system without links
            shutil.copyfile(path, before)


def _text(manifest: dict[str, Any]) -> str:
    """A line a key: indented all through, a hundred thousand uids would take ten times as long."""
    lines = (
        f" {json.dumps(key)}: {json.dumps(value, sort_keys=True, allow_nan=False)}" for key, value in manifest.items()
    )
    return "{\n" + ",\n".join(sorted(lines)) + "\n}\n"


def _parse(data: bytes) -> dict[str, Any]:
    """A manifest without its checksum; raises one of several errors if it is not what was written."""
    manifest: dict[str, Any] = json.loads(data.decode())
    RoundState[manifest["state"]]
    if manifest.pop("check") != _check(manifest):
        raise ValueError("its checksum is another one")
    return manifest


def _whole(path: Path) -> bool:
    try:
        _parse(path.read_bytes())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return True


def _check(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
